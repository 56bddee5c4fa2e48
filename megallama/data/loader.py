"""Batches of a run: the samples of a step, cut over data-parallel ranks and micro-batches.

A context-parallel rank takes its part of every sequence, as `kernels.context_layout` says.
Shape suffixes: B sequences of one micro-batch, S tokens of one sequence, of which this rank holds L.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megallama.config.schema import RunConfig, SourceConfig
from megallama.data.prepared import check_token_file
from megallama.data.stream import SampleStream, WeightedTokenFile
from megallama.data.token_file import TokenFile
from megallama.host.errors import ConfigError, UserError
from megallama.kernels.context_layout import take_shard


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward pass, or this context-parallel rank's part of them (L for S).

    A stage in the middle of a pipeline reads no tokens: the first three are empty there, [B, 0].
    """

    tokens_BS: torch.Tensor
    """int64: what the model reads."""
    labels_BS: torch.Tensor
    """int64: the token after each of them."""
    loss_mask_BS: torch.Tensor
    """float32: 1 where the label counts in the loss."""
    positions_BS: torch.Tensor
    """int64: position of each token in its sequence, [1, S], or in its document, [B, S]."""
    document_starts: tuple[tuple[int, ...], ...]
    """For each sequence, where documents start among all S positions, whatever part this rank holds; 0 first."""


class DataLoader:
    """The batches of one data-parallel rank. Open it with `open_loader`."""

    def __init__(
        self,
        train: SampleStream,
        validation: SampleStream | None,
        *,
        vocab_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        num_micro_batches: int,
        validation_batches: int,
        last_step: int,
        cp_rank: int = 0,
        cp_size: int = 1,
        is_reading_tokens: bool = True,
        is_resetting_positions: bool = False,
    ) -> None:
        assert global_batch_size % (dp_size * num_micro_batches) == 0, (
            global_batch_size,
            dp_size,
            num_micro_batches,
        )
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        self._train = train
        self._validation = validation
        self._vocab_size = vocab_size
        self._global_batch_size = global_batch_size
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._num_micro_batches = num_micro_batches
        self._validation_batches = validation_batches
        self._last_step = last_step
        self._shard = {"cp_rank": cp_rank, "cp_size": cp_size}
        self._is_reading_tokens = is_reading_tokens
        self._is_resetting_positions = is_resetting_positions
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: tuple[int, Future[list[MicroBatch]]] | None = None
        # Sample that step 0 would begin with had every step taken global_batch_size of them.
        self._origin = 0

    @property
    def num_validation_batches(self) -> int:
        """Global batches of one evaluation: `eval.batches`, fewer where the data does not hold as many."""
        if self._validation is None:
            return 0
        in_one_epoch = sum(self._validation.epoch_samples) // self._global_batch_size
        return min(self._validation_batches, max(1, in_one_epoch))

    def resume(self, *, step: int, consumed_samples: int) -> None:
        """Go on at `step` with the sample after those consumed; the global batch size may have been another."""
        self._ahead = None
        self._origin = consumed_samples - step * self._global_batch_size

    def batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of step `step`, counted from 0: a pure function of the step.

        The samples of the step are [step x global_batch_size, (step + 1) x global_batch_size), counted on
        from the consumed ones after `resume`; rank r takes the r-th contiguous share. The next step is read
        in the background meanwhile.

        Raises:
            UserError: a token id that the model does not have.
        """
        ahead, self._ahead = self._ahead, None
        try:
            if ahead is not None and ahead[0] == step:
                return ahead[1].result()
            return self._read(self._train, self._first_sample(step))
        finally:
            if step + 1 < self._last_step:
                self._ahead = (
                    step + 1,
                    self._thread.submit(self._read, self._train, self._first_sample(step + 1)),
                )

    def validation_batches(self) -> list[list[MicroBatch]]:
        """The micro-batches of each validation batch, always the same ones, from the first sample on.

        There are `eval.batches` of them, fewer where the validation data does not hold as many; data
        smaller than one global batch is repeated to fill it.

        Raises:
            UserError: a token id that the model does not have.
        """
        if self._validation is None:
            return []
        size = self._global_batch_size
        return [self._read(self._validation, number * size) for number in range(self.num_validation_batches)]

    def close(self) -> None:
        """Ends the background reading."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _first_sample(self, step: int) -> int:
        return self._origin + step * self._global_batch_size

    def _read(self, stream: SampleStream, first_of_step: int) -> list[MicroBatch]:
        share = self._global_batch_size // self._dp_size
        first = first_of_step + self._dp_rank * share
        size = share // self._num_micro_batches
        starts = range(first, first + share, size)
        return [self._micro_batch(stream, range(start, start + size)) for start in starts]

    def _micro_batch(self, stream: SampleStream, samples: Sequence[int]) -> MicroBatch:
        starts = tuple(stream.document_starts(sample) for sample in samples)
        if self._is_reading_tokens:
            rows_BS = torch.from_numpy(np.stack([self._checked(stream, sample) for sample in samples]))
            tokens_BL, labels_BL = self._part(rows_BS[:, :-1]), self._part(rows_BS[:, 1:])
        else:
            tokens_BL = labels_BL = torch.empty(len(samples), 0, dtype=torch.int64)
        # Rotary positions matter by their differences only, so rows that differ need not cost memory.
        own_starts = starts if self._is_resetting_positions else ((0,),)
        return MicroBatch(
            tokens_BS=tokens_BL,
            labels_BS=labels_BL,
            loss_mask_BS=torch.ones(labels_BL.shape, dtype=torch.float32),
            positions_BS=self._part(positions(own_starts, seq_len=stream.seq_len)),
            document_starts=starts,
        )

    def _part(self, x_BS: torch.Tensor) -> torch.Tensor:
        """What this context-parallel rank holds of a tensor over whole sequences."""
        return take_shard(x_BS, dim=1, **self._shard).contiguous()

    def _checked(self, stream: SampleStream, sample: int) -> npt.NDArray[np.int64]:
        tokens = stream.sample(sample)
        wrong = np.flatnonzero((tokens < 0) | (tokens >= self._vocab_size))
        if wrong.size == 0:
            return tokens
        place = int(wrong[0])
        token = int(tokens[place])
        for piece in stream.locate(sample):
            if place < piece.count:
                raise UserError(
                    f"token id {token} in {piece.file.name} (document {piece.document}, offset"
                    f" {piece.start + place}) is outside model.vocab_size ({self._vocab_size}):"
                    " prepare the data with the model's tokenizer"
                )
            place -= piece.count
        raise AssertionError(sample)


def positions(document_starts: Sequence[Sequence[int]], *, seq_len: int) -> torch.Tensor:
    """Positions [B, S], int64, counted from the last start of each row."""
    position_S = torch.arange(seq_len)
    first_BS = torch.zeros(len(document_starts), seq_len, dtype=torch.int64)
    for row, starts in enumerate(document_starts):
        first_BS[row, list(starts)] = torch.tensor(starts)
    return position_S - first_BS.cummax(dim=1).values


def open_loader(
    config: RunConfig,
    *,
    dp_rank: int,
    dp_size: int,
    num_micro_batches: int,
    cp_rank: int = 0,
    is_reading_tokens: bool = True,
) -> DataLoader:
    """Opens the data of a run for one data-parallel rank.

    Args:
        config: The run.
        dp_rank: Rank among the data-parallel ranks.
        dp_size: Number of these.
        num_micro_batches: Micro-batches of one step.
        cp_rank: Rank among the `parallel.cp` that share a sequence.
        is_reading_tokens: False on stages that need only where documents start.

    Raises:
        ConfigError: missing or damaged files, all at once, or a vocabulary larger than the model's.
        UserError: a source too short for one sample, or with a weight that is not positive.
    """
    problems = [
        problem
        for source in (*config.data.sources, *config.data.validation)
        for problem in check_token_file(source.path)
    ]
    if problems:
        raise ConfigError(problems)
    train = _open(config.data.sources, config=config, shuffle=True)
    validation = (
        _open(config.data.validation, config=config, shuffle=False) if config.data.validation else None
    )
    return DataLoader(
        train,
        validation,
        vocab_size=config.model.vocab_size,
        global_batch_size=config.train.global_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        num_micro_batches=num_micro_batches,
        validation_batches=config.eval.batches,
        last_step=config.train.steps,
        cp_rank=cp_rank,
        cp_size=config.parallel.cp,
        is_reading_tokens=is_reading_tokens,
        is_resetting_positions=config.data.reset_positions,
    )


def _open(sources: Sequence[SourceConfig], *, config: RunConfig, shuffle: bool) -> SampleStream:
    files = [TokenFile(source.path) for source in sources]
    for file in files:
        manifest = file.manifest
        if manifest is not None and manifest.vocab_size > config.model.vocab_size:
            raise ConfigError(
                [
                    f"data source {file.name} has {manifest.vocab_size} token ids, model.vocab_size"
                    f" ({config.model.vocab_size}) holds fewer: prepare it with the model's tokenizer"
                ]
            )
    opened = [
        WeightedTokenFile(file=file, weight=source.weight)
        for file, source in zip(files, sources, strict=True)
    ]
    return SampleStream(opened, seq_len=config.train.seq_len, seed=config.train.seed, shuffle=shuffle)
