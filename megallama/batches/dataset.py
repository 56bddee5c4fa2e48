"""Micro-batches from a dataset of one's own, for any layout.

Shape suffixes: B sequences of one micro-batch, S tokens of one sequence, of which this rank holds L.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch

from megallama.batches.loader import Loader, ReadAhead
from megallama.batches.micro_batch import MicroBatch, RankPart, page_locked, positions, rank_part
from megallama.config.schema import TrainConfig
from megallama.host.errors import UserError
from megallama.topology.groups import Topology

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One training sequence, with what its tokens alone do not say."""

    tokens: Sequence[int] | torch.Tensor
    """`train.seq_len` + 1 token ids: the model reads all but the last, and predicts all but the first."""
    loss_mask: Sequence[float] | torch.Tensor | None = None
    """For each of the `train.seq_len` labels 1 where its loss counts, else 0. None: all count."""
    document_starts: tuple[int, ...] = (0,)
    """Where documents start among the first `train.seq_len` tokens, 0 first; attention never crosses them."""


class Dataset(Protocol):
    """Training sequences by number. A `torch.utils.data.Dataset`, a list and a 2-D array are of this kind.

    Sample `n` is the `n`-th sequence of the run, whatever the layout: step `s` takes `train.global_batch_size` of them
    from `s * train.global_batch_size` on. Order, shuffling and epochs are the dataset's own. The same number must give
    the same sequence on every rank and after a resume.
    """

    def __getitem__(self, number: int, /) -> Any:
        """A `Sample`, or its token ids alone."""


OwnData: TypeAlias = Dataset | Callable[[Topology], Loader]
"""A dataset, or what makes the loader of a rank from its place."""


def own_loader(
    data: OwnData, *, topology: Topology, train: TrainConfig, vocab_size: int, reset_positions: bool = False
) -> Loader:
    """The loader of this rank over data that was given to the run.

    Args:
        data: Sequences by number, or a function from this rank's topology to its loader.
        topology: Place of this rank.
        train: Sizes and length of the run.
        vocab_size: Token ids must be below.
        reset_positions: Count positions from 0 in every document.

    Raises:
        UserError: it is neither.
    """
    if hasattr(data, "__getitem__"):
        part = rank_part(topology, train)
        return DatasetLoader(
            data, part=part, train=train, vocab_size=vocab_size, reset_positions=reset_positions
        )
    loader = data(topology)
    if not isinstance(loader, Loader):
        raise UserError(
            f"data gave a {type(loader).__name__} for this rank: return an object derived from megallama.Loader"
        )
    return loader


class DatasetLoader(Loader):
    """The batches of one data-parallel rank from a dataset. The next step is read in the background."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        part: RankPart,
        train: TrainConfig,
        vocab_size: int,
        reset_positions: bool = False,
    ) -> None:
        self._dataset = dataset
        self._part = part
        self._train = train
        self._vocab_size = vocab_size
        self._reset_positions = reset_positions
        self._first_step = self._first_sample = 0
        self._ahead = ReadAhead(self._read)

    def batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of step `step`.

        Raises:
            UserError: a sample of another length, or a token id that the model does not have.
        """
        return self._ahead(step, has_next=step + 1 < self._train.steps)

    def resume(self, record: Any, *, step: int, consumed_samples: int) -> None:
        """Go on after the samples that were consumed, also with another global batch size."""
        if record is None:
            log.warning(
                "the checkpoint was trained on other data before: this run's own goes on at its sample %d",
                consumed_samples,
            )
        self._first_step, self._first_sample = step, consumed_samples
        self._ahead.forget()

    def check_enough(self) -> None:
        """That a dataset which has a length lasts.

        Raises:
            UserError: it does not.
        """
        dataset: Any = self._dataset
        if not hasattr(dataset, "__len__"):
            return
        length, wanted = len(dataset), self._samples(self._train.steps - 1).stop
        if length < wanted:
            raise UserError(
                f"data ({length} samples) ends before the run, which takes {wanted}: lower train.steps, or let the"
                " dataset begin anew (it decides what sample a number is)"
            )

    def ledger(self, step: int) -> dict[str, Any]:
        """A mark that the data was a dataset: where it goes on is a matter of the consumed samples alone."""
        return {"kind": "dataset"}

    def close(self) -> None:
        """End the background reading."""
        self._ahead.close()

    def _samples(self, step: int) -> range:
        batch = self._train.global_batch_size
        first = self._first_sample + (step - self._first_step) * batch
        return range(first, first + batch)

    def _read(self, step: int) -> list[MicroBatch]:
        return [self._micro_batch(numbers) for numbers in self._part.split(self._samples(step))]

    def _micro_batch(self, numbers: range) -> MicroBatch:
        part, seq_len = self._part, self._train.seq_len
        samples = [self._sample(number) for number in numbers]
        starts = tuple(sample.document_starts for sample in samples)
        if part.is_reading_tokens:
            whole_BS = torch.stack([torch.as_tensor(sample.tokens, dtype=torch.int64) for sample in samples])
            tokens_BL, labels_BL = part.shard(whole_BS[:, :-1]), part.shard(whole_BS[:, 1:])
            mask_BL = part.shard(torch.stack([self._mask(sample) for sample in samples]))
        else:
            tokens_BL = labels_BL = torch.empty(len(samples), 0, dtype=torch.int64)
            mask_BL = torch.empty(len(samples), 0)
        counted_from = starts if self._reset_positions else ((0,),)
        return MicroBatch(
            tokens_BS=page_locked(tokens_BL),
            labels_BS=page_locked(labels_BL),
            loss_mask_BS=page_locked(mask_BL),
            positions_BS=page_locked(part.shard(positions(counted_from, seq_len=seq_len))),
            document_starts=starts,
        )

    def _mask(self, sample: Sample) -> torch.Tensor:
        if sample.loss_mask is None:
            return torch.ones(self._train.seq_len)
        return torch.as_tensor(sample.loss_mask, dtype=torch.float32)

    def _sample(self, number: int) -> Sample:
        """Sample `number`, checked."""
        given = self._dataset[number]
        sample = given if isinstance(given, Sample) else Sample(given)
        seq_len, starts = self._train.seq_len, sample.document_starts
        if len(sample.tokens) != seq_len + 1:
            raise UserError(
                f"data[{number}] has {len(sample.tokens)} tokens: give train.seq_len + 1 ({seq_len + 1}), for the last"
                " one is a label only"
            )
        ids = torch.as_tensor(sample.tokens)
        if ids.is_floating_point():
            raise UserError(f"data[{number}] has tokens of type {ids.dtype}: give whole numbers")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_size:
            raise UserError(
                f"data[{number}] has token id {low if low < 0 else high}, outside model.vocab_size"
                f" ({self._vocab_size}): make the samples with the model's tokenizer"
            )
        if sample.loss_mask is not None and len(sample.loss_mask) != seq_len:
            raise UserError(
                f"data[{number}] has a loss mask of {len(sample.loss_mask)} numbers: give one for each of the"
                f" {seq_len} labels (train.seq_len)"
            )
        if sample.loss_mask is not None and not set(self._mask(sample).tolist()) <= {0.0, 1.0}:
            raise UserError(
                f"data[{number}] has a loss mask with other numbers than 0 and 1: weigh tokens in a loss of your own"
            )
        if tuple(sorted({*starts, 0})) != tuple(starts) or starts[-1] >= seq_len:
            raise UserError(
                f"data[{number}] has document starts {tuple(starts)}: give rising positions below train.seq_len"
                f" ({seq_len}), 0 first"
            )
        return replace(sample, document_starts=tuple(int(start) for start in starts))
