"""Batches: cut over ranks and micro-batches, read ahead, checked against the vocabulary."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megallama.config.schema import (
    DataConfig,
    EvalConfig,
    MixConfig,
    ModelConfig,
    Packing,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from megallama.host.errors import ConfigError, UserError
from megallama.prepare.run import prepare
from megallama.stream.loader import DataLoader, MicroBatch
from megallama.stream.stream import SampleStream
from megallama.tokenizers.load import Tokenizer
from tests.support.builders import part_loader


def write_tokens(prefix: Path, documents: list[list[int]]) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in documents:
        builder.add_document(np.array(document, dtype=np.int32), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """100 documents of 21 tokens, all tokens different."""
    rows = np.arange(2100).reshape(100, 21).tolist()
    return write_tokens(tmp_path_factory.mktemp("tokens") / "train", rows)


def config_of(prefix: str, *, validation: str | None = None, **train: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "steps": 1000,
        "run_dir": "run",
        "seq_len": 10,
        "global_batch_size": 12,
        **train,
    }
    return RunConfig(
        model=ModelConfig(vocab_size=2100),
        train=TrainConfig(**settings),
        data=DataConfig(
            sources=[SourceConfig(path=prefix)],
            validation=[SourceConfig(path=validation)] if validation else [],
        ),
        eval=EvalConfig(batches=3),
    )


_opened: list[DataLoader] = []


@pytest.fixture(autouse=True)
def _no_loader_outlives_its_test() -> Iterator[None]:
    """One that reads ahead while a later test watches the stream would be counted there."""
    yield
    while _opened:
        _opened.pop().close()


def loader_of(
    prefix: str, *, dp_rank: int = 0, dp_size: int = 1, micro: int = 1, **options: Any
) -> DataLoader:
    loader = part_loader(
        config_of(prefix, **options), dp_rank=dp_rank, dp_size=dp_size, num_micro_batches=micro
    )
    _opened.append(loader)
    return loader


def joined(batches: list[MicroBatch]) -> torch.Tensor:
    return torch.cat([batch.tokens_BS for batch in batches])


def test_a_micro_batch_has_tokens_labels_and_mask(prefix: str) -> None:
    loader = loader_of(prefix, micro=3)
    batches = loader.batches(0)
    assert len(batches) == 3
    for batch in batches:
        assert batch.tokens_BS.shape == batch.labels_BS.shape == batch.loss_mask_BS.shape == (4, 10)
        assert batch.tokens_BS.dtype == batch.labels_BS.dtype == torch.int64
        assert batch.loss_mask_BS.dtype == torch.float32 and bool((batch.loss_mask_BS == 1).all())
        assert torch.equal(batch.tokens_BS[:, 1:], batch.labels_BS[:, :-1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        batches[0].tokens_BS = batches[1].tokens_BS  # type: ignore[misc]
    loader.close()


def test_all_that_goes_to_a_gpu_is_page_locked(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[tuple[torch.Size, torch.dtype]] = []
    empty = torch.empty

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        locked.append((tensor.shape, tensor.dtype))
        return tensor

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *a, pin_memory=False, **k: pin(empty(*a, **k)) if pin_memory else empty(*a, **k),
    )
    loader = loader_of(prefix, micro=1)
    loader._read(loader._train, loader._train.samples(0))
    shape = torch.Size([12, 10])
    positions = torch.Size([1, 10])
    assert locked == [
        (positions, torch.int64),  # once for all batches
        *[(shape, torch.int64)] * 2,
        (shape, torch.float32),
    ]


def test_documents_and_positions_come_with_the_tokens(prefix: str) -> None:
    (plain,) = loader_of(prefix, seq_len=32, global_batch_size=3).batches(0)
    config = config_of(prefix, seq_len=32, global_batch_size=3)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, reset_positions=True))
    (reset,) = part_loader(config, dp_rank=0, dp_size=1, num_micro_batches=1).batches(0)
    assert plain.positions_BS.tolist() == [list(range(32))]
    assert plain.document_starts == reset.document_starts
    for tokens, starts, positions in zip(
        plain.tokens_BS, plain.document_starts, reset.positions_BS, strict=True
    ):
        # The documents of this file have 21 tokens, all numbered through.
        document = tokens // 21
        assert list(starts) == [0, *((document[1:] != document[:-1]).nonzero().flatten() + 1).tolist()]
        assert len(starts) > 1
        ends = [*starts[1:], 32]
        assert positions.tolist() == [p for s, e in zip(starts, ends, strict=True) for p in range(e - s)]


@pytest.mark.parametrize("is_resetting", [False, True])
def test_context_parallel_ranks_share_each_sequence(prefix: str, is_resetting: bool) -> None:
    config = config_of(prefix, seq_len=32, global_batch_size=3)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, reset_positions=is_resetting))
    (whole,) = part_loader(config, dp_rank=0, dp_size=1, num_micro_batches=1).batches(2)
    config = dataclasses.replace(config, parallel=ParallelConfig(cp=2))
    parts = [
        part_loader(config, dp_rank=0, dp_size=1, num_micro_batches=1, cp_rank=rank).batches(2)[0]
        for rank in range(2)
    ]
    places = [[*range(8), *range(24, 32)], list(range(8, 24))]
    for part, place in zip(parts, places, strict=True):
        for name in ("tokens_BS", "labels_BS", "loss_mask_BS", "positions_BS"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[:, place]), name
        assert part.document_starts == whole.document_starts, "in positions of the whole sequence"


def test_a_stage_without_tokens_still_knows_the_documents(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = loader_of(prefix, seq_len=32).batches(0)
    monkeypatch.setattr(SampleStream, "read", None)
    config = config_of(prefix, seq_len=32)
    middle = part_loader(config, dp_rank=0, dp_size=1, num_micro_batches=1, is_reading_tokens=False)
    (batch,) = middle.batches(0)
    assert batch.tokens_BS.shape == batch.labels_BS.shape == batch.loss_mask_BS.shape == (12, 0)
    assert batch.document_starts == whole.document_starts
    assert torch.equal(batch.positions_BS, whole.positions_BS)
    middle.close()


@settings(max_examples=25, deadline=None)
@given(
    step=st.integers(0, 900), cut=st.sampled_from([(1, 1), (1, 12), (2, 3), (3, 1), (4, 3), (12, 1), (6, 2)])
)
def test_a_step_is_the_same_for_every_dp_size(prefix: str, step: int, cut: tuple[int, int]) -> None:
    dp_size, micro = cut
    parts = []
    for dp_rank in range(dp_size):
        loader = loader_of(prefix, dp_rank=dp_rank, dp_size=dp_size, micro=micro)
        batches = loader.batches(step)
        assert [len(batch.tokens_BS) for batch in batches] == [12 // (dp_size * micro)] * micro
        parts.append(joined(batches))
        loader.close()
    whole = loader_of(prefix)
    assert torch.equal(torch.cat(parts), joined(whole.batches(step)))
    whole.close()


def test_steps_take_the_samples_one_after_another_whatever_the_batch_size(prefix: str) -> None:
    small, large = loader_of(prefix, global_batch_size=6), loader_of(prefix, global_batch_size=12)
    assert torch.equal(
        torch.cat([joined(small.batches(step)) for step in range(20)]),
        torch.cat([joined(large.batches(step)) for step in range(10)]),
    )


def test_reading_ahead_happens_and_changes_nothing(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, str]] = []
    plain = SampleStream.locate

    def watched(self: SampleStream, index: int) -> Any:
        read.append((index, threading.current_thread().name))
        return plain(self, index)

    # Closed before anything is watched: its own reading ahead must not be counted.
    unwatched = loader_of(prefix)
    expected = [joined(unwatched.batches(step)) for step in range(6)]
    unwatched.close()
    monkeypatch.setattr(SampleStream, "locate", watched)
    loader = loader_of(prefix, steps=6)
    for step in (0, 1, 2, 5, 3, 3, 4, 5):
        assert torch.equal(joined(loader.batches(step)), expected[step])
    loader.close()
    ahead = {index // 12 for index, thread in read if thread.startswith("loader")}
    in_front = [index // 12 for index, thread in read if not thread.startswith("loader")]
    assert {1, 2, 3, 4} <= ahead and 6 not in ahead
    assert {1, 2} & set(in_front) == set(), "steps in a row are read in the background"


@pytest.mark.parametrize(("document", "offset"), [(36, 0), (37, 3), (38, 10), (39, 20), (40, 1), (41, 7)])
@pytest.mark.parametrize("token", [2100, -1])
def test_a_wrong_token_is_named_where_it_is_used(
    tmp_path: Path, document: int, offset: int, token: int
) -> None:
    rows = np.arange(2100).reshape(100, 21)
    rows[document, offset] = token
    loader = loader_of(write_tokens(tmp_path / "坏", rows.tolist()), global_batch_size=1)
    message = rf"token id {token} in .*坏 \(document {document}, offset {offset}\) is outside model.vocab_size \(2100\)"
    failed = []
    for step in range(2099 // 10):
        try:
            loader.batches(step)
        except UserError as error:
            assert re.search(message, str(error)), error
            failed.append(step)
    # Two, where the token is the last of one window and the first of the next.
    assert len(failed) in (1, 2)
    loader.close()


def test_validation_is_always_the_same_from_the_start_of_the_file(prefix: str) -> None:
    loaders = [loader_of(prefix, validation=prefix, dp_rank=r, dp_size=2, micro=2) for r in range(2)]
    assert all(loader.num_validation_batches for loader in loaders)
    loaders[0].batches(7)
    both = [loader.validation_batches() for loader in loaders]
    assert (
        [len(batches) for batches in both] == [loader.num_validation_batches for loader in loaders] == [3, 3]
    )
    found = torch.cat([joined(batches[number]) for number in range(3) for batches in both])
    assert torch.equal(found, torch.arange(360).reshape(36, 10))
    again = loaders[0].validation_batches()
    assert all(torch.equal(joined(a), joined(b)) for a, b in zip(both[0], again, strict=True))


def test_small_validation_data_is_not_repeated_beyond_one_batch(prefix: str, tmp_path: Path) -> None:
    small = write_tokens(tmp_path / "small", [list(range(300))])
    assert len(loader_of(prefix, validation=small).validation_batches()) == 2
    tiny = write_tokens(tmp_path / "tiny", [list(range(21))])
    (batch,) = loader_of(prefix, validation=tiny).validation_batches()
    assert joined(batch)[:, 0].tolist() == [0, 10] * 6


def test_no_validation(prefix: str) -> None:
    loader = loader_of(prefix)
    assert loader.num_validation_batches == 0 and loader.validation_batches() == []
    assert loader.num_validation_batches == 0


def test_all_bad_files_are_named_at_once(prefix: str, tmp_path: Path) -> None:
    config = config_of(str(tmp_path / "无"), validation=str(tmp_path / "gone"))
    with pytest.raises(ConfigError) as caught:
        part_loader(config, dp_rank=0, dp_size=1, num_micro_batches=1)
    assert len(caught.value.problems) == 2


def test_a_vocabulary_above_the_models_is_refused(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    report = prepare([corpus], tmp_path, tokenizer=tokenizer_path, workers=1)
    config = config_of(str(report.train.prefix))
    fitting = part_loader(config, dp_rank=0, dp_size=1, num_micro_batches=1)
    fitting.batches(0)
    fitting.close()
    small = dataclasses.replace(config, model=ModelConfig(vocab_size=499))
    with pytest.raises(ConfigError, match=r"has 500 token ids, model.vocab_size \(499\)"):
        part_loader(small, dp_rank=0, dp_size=1, num_micro_batches=1)


def changed(config: RunConfig, **data: Any) -> RunConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


def open_one(config: RunConfig, **part: Any) -> DataLoader:
    loader = part_loader(config, **{"dp_rank": 0, "dp_size": 1, "num_micro_batches": 1, **part})
    _opened.append(loader)
    return loader


def rows(loader: DataLoader, steps: range) -> list[list[int]]:
    return [row for step in steps for batch in loader.batches(step) for row in batch.tokens_BS.tolist()]


def through_json(loader: DataLoader, step: int) -> Any:
    return json.loads(json.dumps(loader.ledger(step)))


@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_a_resumed_loader_goes_on_under_another_batch_size_mix_and_dp_size(
    prefix: str, tmp_path: Path, dp_size: int
) -> None:
    config = config_of(prefix)
    first = open_one(config)
    taken = rows(first, range(5))
    assert len({row[0] for row in taken}) == 60, "210 windows: nothing comes twice"
    other = write_tokens(tmp_path / "新", [list(range(2099, 1999, -1))])
    config = changed(
        config_of(prefix, global_batch_size=6), sources=[SourceConfig(path=prefix), SourceConfig(path=other)]
    )
    resumed = []
    for rank in range(dp_size):
        loader = open_one(config, dp_rank=rank, dp_size=dp_size)
        loader.resume(through_json(first, 5), step=5, consumed_samples=60)
        resumed.append(loader)
    together = [
        row for step in range(5, 15) for loader in resumed for row in rows(loader, range(step, step + 1))
    ]
    from_new = [row for row in together if sum(b < a for a, b in itertools.pairwise(row)) > 5]
    assert 29 <= len(from_new) <= 31
    assert not {tuple(row) for row in together if row not in from_new} & {tuple(row) for row in taken}
    # And the steps before are still on record, as the older loader took them.
    resumed[0].close()
    assert resumed[0].ledger(15)["paces"] == [
        {"first_step": 0, "first_sample": 0, "global_batch_size": 12},
        {"first_step": 5, "first_sample": 60, "global_batch_size": 6},
    ]


def test_a_checkpoint_without_a_record_begins_anew_where_the_run_stands(prefix: str) -> None:
    loader = open_one(config_of(prefix))
    loader.resume(None, step=7, consumed_samples=84)
    assert rows(loader, range(7, 9)) == rows(open_one(config_of(prefix)), range(2))


def test_what_was_read_ahead_before_a_resume_is_forgotten(prefix: str) -> None:
    loader = open_one(config_of(prefix))
    loader.batches(6)  # and step 7 in the background
    loader.resume(None, step=7, consumed_samples=84)
    assert rows(loader, range(7, 8)) == rows(open_one(config_of(prefix)), range(1))


def test_a_record_of_another_checkpoint_is_refused(prefix: str) -> None:
    loader = open_one(config_of(prefix))
    with pytest.raises(
        UserError, match=r"\(step 5, 60 samples\) is not of this checkpoint \(step 6, 72 samples"
    ):
        loader.resume(loader.ledger(5), step=6, consumed_samples=72)


def test_scheduled_mixes_take_over_at_their_step(prefix: str, tmp_path: Path) -> None:
    other = write_tokens(tmp_path / "b", [list(range(2000, 2100))])
    schedule = [MixConfig(from_step=3, sources=[SourceConfig(path=other)])]
    loader = open_one(changed(config_of(prefix), schedule=schedule))
    windows = open_one(config_of(other))
    expected = {tuple(row) for row in rows(windows, range(1))}
    assert {tuple(row) for row in rows(loader, range(3, 4))} == expected
    assert rows(loader, range(3)) == rows(open_one(config_of(prefix)), range(3))


def test_data_that_runs_out_is_told_before_the_first_step(prefix: str) -> None:
    capped = changed(config_of(prefix, steps=18), sources=[SourceConfig(path=prefix, max_epochs=1.0)])
    loader = open_one(capped)
    with pytest.raises(UserError, match=r"the data runs out at step 17 of train.steps \(18\).*max_epochs"):
        loader.check_enough()
    assert len({tuple(row) for row in rows(loader, range(17))}) == 17 * 12
    enough = open_one(changed(config_of(prefix, steps=17), sources=capped.data.sources))
    enough.check_enough()
    by_one = open_one(changed(config_of(prefix, steps=210, global_batch_size=1), sources=capped.data.sources))
    with pytest.raises(UserError, match=r"at step 209 of train.steps \(210\)"):
        by_one.check_enough()


def test_held_out_documents_are_evaluated_and_never_trained_on(prefix: str) -> None:
    sources = [SourceConfig(path=prefix, validation_fraction=0.1)]
    loader = open_one(changed(config_of(prefix), sources=sources))
    trained = {token for row in rows(loader, range(30)) for token in row}
    evaluated = [b.tokens_BS.tolist() for batches in loader.validation_batches() for b in batches]
    assert max(trained) < 90 * 21 <= min(token for batch in evaluated for row in batch for token in row)
    assert evaluated[0][0] == list(range(90 * 21, 90 * 21 + 10))


def test_cut_documents_begin_every_sequence(prefix: str, tmp_path: Path) -> None:
    config = config_of(prefix, seq_len=32, global_batch_size=5, run_dir=str(tmp_path / "运行"))
    loader = open_one(changed(config, packing=Packing.cut))
    taken = rows(loader, range(9))
    assert all(row[0] % 21 == 0 for row in taken)
    assert len({row[0] for row in taken}) == 45, "two documents a sequence of which the second is cut: 49 fit"
    assert [path.suffix for path in sorted((tmp_path / "运行" / "data-index").iterdir())] == [
        ".lock",
        ".starts",
    ]


@pytest.mark.parametrize("cp", [1, 2])
def test_labels_at_the_ends_of_documents_count_as_asked(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, cp: int
) -> None:
    report = prepare([corpus], tmp_path, tokenizer=tokenizer.path, workers=1)
    config = config_of(str(report.train.prefix), seq_len=64)
    config = dataclasses.replace(config, parallel=ParallelConfig(cp=cp))
    for kept_eod, kept_next in ((False, True), (True, False), (False, False)):
        asked = changed(config, loss_on_eod=kept_eod, loss_after_eod=kept_next)
        left_out = 0
        for rank in range(cp):
            loader = open_one(asked, cp_rank=rank)
            for batch in (batch for step in range(4) for batch in loader.batches(step)):
                ends, after = batch.labels_BS == tokenizer.eod_id, batch.tokens_BS == tokenizer.eod_id
                expected = ~((ends & (not kept_eod)) | (after & (not kept_next)))
                assert torch.equal(batch.loss_mask_BS, expected.float())
                left_out += int((~expected).sum())
        assert left_out > 3


def test_the_end_of_document_token_must_be_known_to_leave_it_out(prefix: str) -> None:
    with pytest.raises(UserError, match=r"data.loss_on_eod \(false\) needs the manifest of data source"):
        open_one(changed(config_of(prefix), loss_on_eod=False))


def test_a_context_parallel_rank_reads_its_own_part_only(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, read = SampleStream.read, list[tuple[int, int]]()

    def watched(self: SampleStream, located: Any, start: int, stop: int) -> Any:
        read.append((start, stop))
        return plain(self, located, start, stop)

    monkeypatch.setattr(SampleStream, "read", watched)
    config = dataclasses.replace(config_of(prefix, seq_len=32), parallel=ParallelConfig(cp=2))
    open_one(config, cp_rank=1, dp_rank=1, dp_size=4).batches(999)
    assert read == [(8, 17), (16, 25)] * 3, "the rank's three sequences, two chunks and one label more each"


def test_an_error_of_the_reading_thread_reaches_the_trainer(prefix: str, tmp_path: Path) -> None:
    documents = np.arange(2100).reshape(100, 21).tolist()
    documents[50][3] = 5000
    loader = open_one(config_of(write_tokens(tmp_path / "a", documents), steps=18))
    with pytest.raises(UserError, match=r"token id 5000 in .*a \(document 50, offset 3\)"):
        for step in range(18):
            loader.batches(step)


def test_a_sample_costs_few_calls(prefix: str) -> None:
    """What a loader without workers can give is decided by these; their number depends on no machine."""
    loader, calls = loader_of(prefix), 0
    loader.batches(0)

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        loader.batches(14)  # not the next one, so it is read here and now
    finally:
        sys.setprofile(before)
    assert calls / 12 < 140


def test_two_sources_with_the_same_content_are_refused(prefix: str, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(prefix + suffix, tmp_path / f"b{suffix}")
    twice = [SourceConfig(path=prefix), SourceConfig(path=str(tmp_path / "b"))]
    with pytest.raises(UserError, match=r"train and .*b hold the same data: leave one out"):
        open_one(changed(config_of(prefix), sources=twice))
