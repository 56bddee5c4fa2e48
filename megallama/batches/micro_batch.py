"""What a forward pass reads, and which part of a step one rank takes.

Shape suffixes: B sequences of one micro-batch, S tokens of one sequence, of which a context-parallel rank holds L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megallama.config.schema import TrainConfig
from megallama.grid import num_micro_batches
from megallama.kernels.attention.zigzag import take_shard
from megallama.topology.groups import Topology


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
    """float32: 1 where the label counts in the loss, else 0."""
    positions_BS: torch.Tensor
    """int64: position of each token in its sequence, [1, S], or in its document, [B, S]."""
    document_starts: tuple[tuple[int, ...], ...]
    """For each sequence, where documents start among all S positions, whatever part this rank holds; 0 first."""


@dataclass(frozen=True)
class RankPart:
    """Which part of a step one rank reads."""

    dp_rank: int = 0
    dp_size: int = 1
    num_micro_batches: int = 1
    """Micro-batches of one step."""
    cp_rank: int = 0
    cp_size: int = 1
    """Ranks that share a sequence."""
    is_reading_tokens: bool = True
    """False on stages that need only where documents start."""

    def split(self, samples: range) -> list[range]:
        """The samples of each micro-batch: rank r takes the r-th contiguous share of a step."""
        share = len(samples) // self.dp_size
        size = share // self.num_micro_batches
        first = self.dp_rank * share
        return [samples[start : start + size] for start in range(first, first + share, size)]

    def shard(self, x_BS: torch.Tensor) -> torch.Tensor:
        """What this context-parallel rank holds of a tensor over whole sequences."""
        return take_shard(x_BS, dim=1, cp_size=self.cp_size, cp_rank=self.cp_rank).contiguous()


def rank_part(topology: Topology, train: TrainConfig) -> RankPart:
    """What the rank at this place reads: tokens on the first and the last stage, document starts between them."""
    return RankPart(
        dp_rank=topology.dp_rank,
        dp_size=topology.grid.dp,
        num_micro_batches=num_micro_batches(
            train.global_batch_size, micro_batch_size=train.micro_batch_size, dp=topology.grid.dp
        ),
        cp_rank=topology.cp_rank,
        cp_size=topology.grid.cp,
        is_reading_tokens=topology.is_first_stage or topology.is_last_stage,
    )


def positions(document_starts: Sequence[Sequence[int]], *, seq_len: int) -> torch.Tensor:
    """Positions [B, S], int64, counted from the last start of each row."""
    position_S = torch.arange(seq_len)
    first_BS = torch.zeros(len(document_starts), seq_len, dtype=torch.int64)
    for row, starts in enumerate(document_starts):
        first_BS[row, list(starts)] = torch.tensor(starts)
    return position_S - first_BS.cummax(dim=1).values


def page_locked(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` where the copy to the device can run beside the computation."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor
