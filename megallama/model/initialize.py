"""Initial weights that do not depend on the layout.

Every canonical tensor is a function of its name and the seed. It is drawn in blocks of rows (of columns where
tensor parallel cuts columns), each block from a stream of its own, so that a rank draws the blocks it keeps and
no others: 1/tp of each matrix, and at most two blocks more. The numbers come from torch's CPU generator on
every host, so CPU and GPU runs start from the same weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch

from megallama.config.schema import ModelConfig
from megallama.model.layout import Piece

BLOCK = 64
"""Rows (or columns) drawn from one stream. Part of the definition: another value gives other weights."""

RESIDUAL_OUTPUTS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
"""Matrices that write to the residual stream; tensor parallel cuts their columns."""


@torch.no_grad()
def initialize_parameter(
    parameter: torch.Tensor, pieces: Iterable[Piece], *, model: ModelConfig, seed: int
) -> None:
    """Fill a local parameter with its part of the canonical initial weights.

    Norm weights are 1, biases 0; matrices are normal with `init_std`, divided by sqrt(2 x num_layers) where they
    write to the residual stream (GPT-2's rule, which Megatron-LM and LLaMA reproductions share).
    """
    flat = parameter.view(-1)
    for piece in pieces:
        target = flat[piece.start : piece.start + math.prod(piece.shape)].view(piece.shape)
        if len(piece.global_shape) == 1:
            target.fill_(0.0 if piece.key.endswith(".bias") else 1.0)
            continue
        is_output = piece.key.endswith(RESIDUAL_OUTPUTS)
        std = model.init_std / math.sqrt(2 * model.num_layers) if is_output else model.init_std
        _draw(target, piece, seed=seed, std=std, axis=1 if is_output else 0)


def _draw(target: torch.Tensor, piece: Piece, *, seed: int, std: float, axis: int) -> None:
    """Write `piece` of its canonical matrix into `target`; `axis` is the one drawn in blocks."""
    across = 1 - axis
    assert piece.offset[across] == 0 and piece.shape[across] == piece.global_shape[across], piece
    width = piece.global_shape[across]
    view = target if axis == 0 else target.T
    begin, end = piece.offset[axis], piece.offset[axis] + piece.shape[axis]
    for block in range(begin // BLOCK, -(-end // BLOCK)):
        first = block * BLOCK
        rows = min(BLOCK, piece.global_shape[axis] - first)
        values = torch.randn(rows, width, generator=_stream(seed, piece.key, block)).mul_(std)
        low, high = max(begin, first), min(end, first + rows)
        view[low - begin : high - begin].copy_(values[low - first : high - first])


def _stream(seed: int, key: str, block: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{key}/{block}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
