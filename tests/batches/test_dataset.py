"""Micro-batches of a dataset of one's own: cut like those of token files, checked, resumed by consumed samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megallama.batches.dataset import DatasetLoader, Sample
from megallama.batches.micro_batch import RankPart
from megallama.config.schema import TrainConfig
from megallama.host.errors import UserError

SEQ_LEN = 8
TRAIN = TrainConfig(steps=3, seq_len=SEQ_LEN, global_batch_size=4)


def tokens(number: int) -> list[int]:
    return [(10 * number + i) % 100 for i in range(SEQ_LEN + 1)]


class Numbers:
    def __getitem__(self, number: int) -> Any:
        return tokens(number)


def loader(dataset: Any, *, train: TrainConfig = TRAIN, **part: Any) -> DatasetLoader:
    return DatasetLoader(dataset, part=RankPart(**part), train=train, vocab_size=100)


def rows(batches: Any) -> list[list[int]]:
    return [row for batch in batches for row in batch.tokens_BS.tolist()]


def test_ranks_and_micro_batches_share_the_samples_of_a_step() -> None:
    wanted = [tokens(number)[:-1] for number in range(4, 8)]
    assert rows(loader(Numbers(), num_micro_batches=2).batches(1)) == wanted
    shares = [rows(loader(Numbers(), dp_rank=rank, dp_size=2).batches(1)) for rank in (0, 1)]
    assert shares[0] + shares[1] == wanted
    (batch,) = loader(Numbers()).batches(0)
    assert torch.equal(batch.labels_BS[:, :-1], batch.tokens_BS[:, 1:])
    assert batch.loss_mask_BS.sum() == 4 * SEQ_LEN


def test_context_parallel_ranks_hold_their_part_and_middle_stages_no_tokens() -> None:
    parts = [loader(Numbers(), cp_rank=rank, cp_size=2).batches(0)[0] for rank in (0, 1)]
    assert parts[0].tokens_BS[0].tolist() == [0, 1, 6, 7] and parts[1].tokens_BS[0].tolist() == [2, 3, 4, 5]
    assert parts[1].labels_BS[0].tolist() == [3, 4, 5, 6]
    assert parts[0].positions_BS.tolist() == [[0, 1, 6, 7]]
    (middle,) = loader(Numbers(), is_reading_tokens=False).batches(0)
    assert middle.tokens_BS.shape == middle.loss_mask_BS.shape == (4, 0)
    assert middle.document_starts == ((0,),) * 4


def test_a_sample_has_a_mask_and_documents() -> None:
    mask = [0.0, 1.0] * (SEQ_LEN // 2)
    sample = Sample(torch.arange(SEQ_LEN + 1), loss_mask=mask, document_starts=[0, 3])
    one = DatasetLoader(
        [sample] * 4, part=RankPart(), train=TRAIN, vocab_size=100, reset_positions=True
    ).batches(0)[0]
    assert one.loss_mask_BS[2].tolist() == mask and one.document_starts[0] == (0, 3)
    assert one.positions_BS[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]


def test_a_resumed_run_goes_on_after_the_consumed_samples() -> None:
    resumed = loader(Numbers(), train=TrainConfig(steps=9, seq_len=SEQ_LEN, global_batch_size=2))
    resumed.batches(0)
    resumed.resume({"kind": "dataset"}, step=3, consumed_samples=12)
    assert rows(resumed.batches(3)) == [tokens(12)[:-1], tokens(13)[:-1]]
    assert rows(resumed.batches(4)) == [tokens(14)[:-1], tokens(15)[:-1]]


def test_a_dataset_that_ends_before_the_run_is_refused() -> None:
    loader([tokens(n) for n in range(12)]).check_enough()
    loader(Numbers()).check_enough()
    with pytest.raises(UserError, match=r"data \(11 samples\) ends before the run, which takes 12"):
        loader([tokens(n) for n in range(11)]).check_enough()


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ([1] * SEQ_LEN, r"data\[0\] has 8 tokens: give train.seq_len \+ 1 \(9\)"),
        ([100] * (SEQ_LEN + 1), r"token id 100, outside model.vocab_size \(100\)"),
        ([-1] * (SEQ_LEN + 1), "token id -1, outside"),
        (Sample([1] * (SEQ_LEN + 1), loss_mask=[1.0]), "loss mask of 1 numbers"),
        (Sample([1] * (SEQ_LEN + 1), loss_mask=[0.5] * SEQ_LEN), "other numbers than 0 and 1"),
        ([1.0] * (SEQ_LEN + 1), "tokens of type torch.float32"),
        (Sample([1] * (SEQ_LEN + 1), document_starts=(1, 2)), "document starts"),
        (Sample([1] * (SEQ_LEN + 1), document_starts=(0, SEQ_LEN)), "document starts"),
    ],
)
def test_a_sample_that_does_not_fit_is_told(sample: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        loader([sample] * 4).batches(0)
