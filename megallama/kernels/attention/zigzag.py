"""Which positions of a sequence each context-parallel rank holds.

A sequence is cut into 2 x cp chunks and rank i holds chunks i and 2 x cp - 1 - i, in this order. Under a causal
mask late chunks cost more than early ones; so paired, every rank has the same work (Llama 3, arXiv:2407.21783,
section 3.3.2). With one rank it holds everything in its natural order.

Shapes: P ranks, S positions of the whole sequence, L = S / P positions of one rank.
"""

from __future__ import annotations

import torch

Stretch = tuple[int, int]
"""Positions [first, second)."""


def stretches(seq_len: int, *, cp_size: int, cp_rank: int) -> tuple[Stretch, ...]:
    """The stretches of the whole sequence that a rank holds, in the order in which it holds them."""
    if cp_size == 1:
        return ((0, seq_len),)
    assert seq_len % (2 * cp_size) == 0 and 0 <= cp_rank < cp_size, (seq_len, cp_size, cp_rank)
    chunk = seq_len // (2 * cp_size)
    return tuple((n * chunk, (n + 1) * chunk) for n in (cp_rank, 2 * cp_size - 1 - cp_rank))


def take_shard(tensor: torch.Tensor, *, dim: int, cp_size: int, cp_rank: int) -> torch.Tensor:
    """What a rank holds of `tensor`, whose dimension `dim` is the whole sequence."""
    parts = [
        tensor.narrow(dim, begin, end - begin)
        for begin, end in stretches(tensor.size(dim), cp_size=cp_size, cp_rank=cp_rank)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def to_natural(x_PL: torch.Tensor) -> torch.Tensor:
    """The shards of all ranks, [P, L, ...], as one sequence [S, ...]."""
    if x_PL.size(0) == 1:
        return x_PL[0]
    halves = x_PL.unflatten(1, (2, -1))
    return torch.cat([halves[:, 0], halves[:, 1].flip(0)]).flatten(0, 1)


def to_shards(x_S: torch.Tensor, *, cp_size: int) -> torch.Tensor:
    """A sequence [S, ...] as the shards of all ranks, [P, L, ...] contiguous; inverse of `to_natural`."""
    if cp_size == 1:
        return x_S.unsqueeze(0)
    chunks = x_S.unflatten(0, (2 * cp_size, -1))
    return torch.stack([chunks[:cp_size], chunks[cp_size:].flip(0)], dim=1).flatten(1, 2)
