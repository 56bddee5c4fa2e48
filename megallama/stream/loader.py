"""The batches of a run: the samples of a step, split over data-parallel ranks and micro-batches.

A context-parallel rank takes its part of every sequence, as `kernels/attention/zigzag.py` says. Only that part is
read, straight from the mapped file into the tensor that goes to the device.
Shape suffixes: B sequences of one micro-batch, S tokens of one sequence, of which this rank holds L.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megallama.batches.loader import Loader, ReadAhead
from megallama.batches.micro_batch import MicroBatch, RankPart, page_locked, positions
from megallama.config.schema import DataConfig, EvalConfig, TrainConfig
from megallama.host.errors import UserError
from megallama.kernels.attention.zigzag import stretches
from megallama.stream.history import History, Pace
from megallama.stream.ledger import from_plain, to_plain
from megallama.stream.open import RunData, open_data
from megallama.stream.stream import Located, SampleStream, token_of

_UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


class DataLoader(Loader):
    """The batches of one data-parallel rank. Open it with `open_loader`."""

    record_name = "data"
    is_traceable = True

    def __init__(
        self,
        opened: RunData,
        *,
        data: DataConfig,
        train: TrainConfig,
        vocab_size: int,
        evaluation: EvalConfig,
        part: RankPart,
    ) -> None:
        cut = part.dp_size * part.num_micro_batches
        assert train.global_batch_size % cut == 0, (train.global_batch_size, part)
        assert 0 <= part.dp_rank < part.dp_size, part
        self._data_config = data
        self._train_config = train
        self._vocab_size = vocab_size
        self._evaluation = evaluation
        self._data = opened
        self._part = part
        self._seq_len = train.seq_len
        self._spans = stretches(self._seq_len, cp_size=part.cp_size, cp_rank=part.cp_rank)
        self._plain_positions = page_locked(part.shard(positions(((0,),), seq_len=self._seq_len)))
        self._train = self._continued(History(), step=0)
        self._ahead = ReadAhead(self._read_step)

    @property
    def num_validation_batches(self) -> int:
        """Global batches of one evaluation: `eval.batches`, fewer where the data does not hold as many."""
        if self._data.validation is None:
            return 0
        in_one_epoch = sum(self._data.validation.epoch_samples) // self._train_config.global_batch_size
        return min(self._evaluation.batches, max(1, in_one_epoch))

    def resume(self, record: Any, *, step: int, consumed_samples: int) -> None:
        """Go on at `step` with the mix of the configuration, after what `record` says was consumed.

        Args:
            record: What `ledger` gave to the checkpoint; None if an older megallama wrote it.
            step: Completed steps.
            consumed_samples: Sequences that they took.

        Raises:
            UserError: the ledger is of another version, damaged, or of another run.
        """
        if record is None:
            # Its order of samples is not ours: every source begins anew.
            before = History(paces=(Pace(step, consumed_samples, self._train_config.global_batch_size),))
        else:
            before = from_plain(record)
            recorded = record["step"], before.first_sample(record["step"])
            if recorded != (step, consumed_samples):
                raise UserError(
                    f"the record of consumed data (step {recorded[0]}, {recorded[1]} samples) is"
                    f" not of this checkpoint (step {step}, {consumed_samples} samples): go on from another one"
                )
        self._ahead.forget()
        self._train = self._continued(before, step=step)

    def check_enough(self) -> None:
        """That the data lasts to the end of the run.

        Raises:
            UserError: it runs out before.
        """
        shortage = self._train.history.shortage(self._train_config.steps)
        if shortage is not None:
            raise UserError(shortage)

    def ledger(self, step: int) -> dict[str, Any]:
        """The mixes of the run and what was consumed of each source before `step`, for checkpoints and run folder."""
        return to_plain(self._train.history, step=step)

    def sample_ids(self, step: int) -> dict[str, Any]:
        """Which samples the whole job takes at step `step`, counted from 0, as plain values.

        `samples` has [source, epoch, place] of each row of the global batch: its number in `sources`, which are
        paths, the epoch of that source, and how many samples of that epoch came before. `first_sample` is the
        number of row 0 in the run. Nothing is read for it.
        """
        samples = self._train.samples(step)
        sources: dict[str, int] = {}
        rows = [
            (sources.setdefault(path, len(sources)), epoch, place)
            for path, epoch, place in map(self._train.identify, samples)
        ]
        return {"first_sample": samples.start, "sources": list(sources), "samples": rows}

    def batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of step `step`, counted from 0: a pure function of history and step.

        Rank r takes the r-th contiguous share of the samples of the step. The next step is read in the
        background meanwhile.

        Raises:
            UserError: a token id that the model does not have, a damaged file, or no data left.
        """
        last = min(self._train_config.steps, self._train.history.num_steps())
        return self._ahead(step, has_next=step + 1 < last)

    def validation_batches(self) -> list[list[MicroBatch]]:
        """The micro-batches of each validation batch, always the same ones, from the first sample on.

        There are `eval.batches` of them, fewer where the validation data does not hold as many; data
        smaller than one global batch is repeated to fill it.

        Raises:
            UserError: a token id that the model does not have, or a damaged file.
        """
        stream = self._data.validation
        if stream is None:
            return []
        return [self._read(stream, stream.samples(number)) for number in range(self.num_validation_batches)]

    def close(self) -> None:
        """Ends the background reading."""
        self._ahead.close()

    def _continued(self, before: History, *, step: int) -> SampleStream:
        batch = self._train_config.global_batch_size
        history = before.continued(step, global_batch_size=batch, plan=self._data.plan)
        return SampleStream(history, self._data.shelf)

    def _read_step(self, step: int) -> list[MicroBatch]:
        return self._read(self._train, self._train.samples(step))

    def _read(self, stream: SampleStream, samples: range) -> list[MicroBatch]:
        return [self._micro_batch(stream, numbers) for numbers in self._part.split(samples)]

    def _micro_batch(self, stream: SampleStream, samples: Sequence[int]) -> MicroBatch:
        located = [stream.locate(sample) for sample in samples]
        starts = [stream.document_starts(sample) for sample in located]
        length = sum(end - begin for begin, end in self._spans) if self._part.is_reading_tokens else 0
        # Page-locked, all of it, so that the copy to the device is the only one and runs beside the computation.
        shape, pinned = (len(samples), length), torch.cuda.is_available()
        tokens_BL = torch.empty(shape, dtype=torch.int64, pin_memory=pinned)
        labels_BL = torch.empty(shape, dtype=torch.int64, pin_memory=pinned)
        if self._part.is_reading_tokens:
            for sample, tokens_L, labels_L in zip(located, tokens_BL.numpy(), labels_BL.numpy(), strict=True):
                self._fill(stream, sample, tokens_L, labels_L)
        # The last of the seq_len + 1 tokens is a label only.
        inside = tuple(tuple(row if row[-1] < self._seq_len else row[:-1]) for row in starts)
        return MicroBatch(
            tokens_BS=tokens_BL,
            labels_BS=labels_BL,
            loss_mask_BS=page_locked(self._loss_mask(labels_BL, starts)),
            positions_BS=self._positions(inside),
            document_starts=inside,
        )

    def _positions(self, document_starts: Sequence[Sequence[int]]) -> torch.Tensor:
        # Rotary positions matter by their differences only, so rows that differ need not cost memory.
        if not self._data_config.reset_positions:
            return self._plain_positions
        return page_locked(self._part.shard(positions(document_starts, seq_len=self._seq_len)))

    def _fill(
        self,
        stream: SampleStream,
        sample: Located,
        tokens_L: npt.NDArray[np.int64],
        labels_L: npt.NDArray[np.int64],
    ) -> None:
        """Copy this rank's tokens of a sample, and the token after each, from the mapped file."""
        offset = 0
        for begin, end in self._spans:
            length, place = end - begin, 0
            for view in stream.read(sample, begin, end + 1):
                self._check(view, sample, begin + place)
                count = len(view)
                inputs = min(count, length - place)
                tokens_L[offset + place : offset + place + inputs] = view[:inputs]
                place += count
            # Of the label after the last input there is no input to copy from.
            labels_L[offset : offset + length - 1] = tokens_L[offset + 1 : offset + length]
            labels_L[offset + length - 1] = view[-1]
            offset += length

    def _loss_mask(self, labels_BL: torch.Tensor, starts: Sequence[Sequence[int]]) -> torch.Tensor:
        mask_BL = torch.ones(labels_BL.shape, dtype=torch.float32)
        if not self._part.is_reading_tokens:
            return mask_BL
        if self._data.eod_id is not None:
            mask_BL[labels_BL == self._data.eod_id] = 0
        if not self._data_config.loss_after_eod:
            counted_BS = torch.ones(len(starts), self._seq_len)
            for row, row_starts in enumerate(starts):
                counted_BS[row, [start - 1 for start in row_starts if start]] = 0
            mask_BL *= self._part.shard(counted_BS)
        return mask_BL

    def _check(self, view: npt.NDArray[np.integer], sample: Located, first: int) -> None:
        vocab_size = self._vocab_size
        # Without a sign, negative numbers are the largest.
        if int(np.maximum.reduce(view.view(_UNSIGNED[view.itemsize]))) < vocab_size:
            return
        wrong = int(np.flatnonzero((view < 0) | (view >= vocab_size))[0])
        place = sample.source.place(token_of(sample, first + wrong))
        raise UserError(
            f"token id {view[wrong]} in {place.file} (document {place.document}, offset {place.offset}) is outside"
            f" model.vocab_size ({vocab_size}): prepare the data with the model's tokenizer"
        )


def open_loader(
    data: DataConfig,
    *,
    train: TrainConfig,
    vocab_size: int,
    evaluation: EvalConfig,
    part: RankPart,
) -> DataLoader:
    """Opens the data of a run for one rank.

    Args:
        data: Sources, and what of their tokens counts.
        train: Sizes and length of the run; the index of its samples lies in `run_dir`.
        vocab_size: Token ids must be below.
        evaluation: How much is evaluated on.
        part: What this rank reads.

    Raises:
        ConfigError: missing or damaged files, a vocabulary larger than the model's, or sources that cannot be mixed.
    """
    opened = open_data(data, train=train, vocab_size=vocab_size)
    return DataLoader(opened, data=data, train=train, vocab_size=vocab_size, evaluation=evaluation, part=part)
