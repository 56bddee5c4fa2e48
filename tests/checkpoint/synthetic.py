"""A small model's optimizer state without a model: canonical tensors, cut over tp and ZeRO ranks.

Every rank flattens its local parameters into one padded buffer and owns an equal slice of it, so slices begin
and end anywhere. The values of the canonical tensors follow from their names.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch

from megallama.checkpoint.format.boxes import BoxedTensor, build_boxes
from megallama.engine.fragment import Fragment
from megallama.model.layout import Piece

KINDS = ("fp32", "exp_avg", "exp_avg_sq")
SHAPES = {
    "embedding": (50, 16),
    "layers.0.qkv": (24, 10),
    "layers.0.proj": (10, 2048),
    "layers.0.gate": (12, 7),
    "layers.0.up": (12, 7),
    "layers.0.experts": (3, 4, 6),
    "layers.0.归一化": (16,),
    "bias": (1,),
}
SPLIT_DIM = {"embedding": 0, "layers.0.qkv": 0, "layers.0.proj": 1, "layers.0.gate": 0, "layers.0.up": 0}
FUSED = {"layers.0.gate_up": ("layers.0.gate", "layers.0.up")}
"""Local parameters that hold two canonical tensors."""
MODEL = {"hidden_size": 16, "num_layers": 1, "name": "小模型"}
STATE = {
    "step": 5,
    "consumed_tokens": 4096,
    "scale": 65536.5,
    "note": "第一次",
    "nested": {"list": [1, None, True]},
}


@dataclass(frozen=True)
class Layout:
    """How the state is cut."""

    tp: int
    dp: int
    is_sharded: bool = True
    """False: every dp rank holds everything and the first one writes (ZeRO 0)."""


def canonical(key: str, *, seed: int = 0) -> torch.Tensor:
    """The whole tensor of `<kind>/<name>`."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()) + seed)
    return torch.randn(SHAPES[key.partition("/")[2]], generator=generator)


def boxes_of(
    layout: Layout, rank: int, *, seed: int | None = 0, cap: int | None = 64
) -> dict[str, BoxedTensor]:
    """The boxes of `rank` (tp fastest), filled with the canonical values, or with NaN when `seed` is None."""
    tp_rank, dp_rank = rank % layout.tp, rank // layout.tp
    pieces = _pieces(layout, tp_rank)
    sizes = {name: sum(math.prod(piece.shape) for piece in of_name) for name, of_name in pieces.items()}
    length = -(-sum(sizes.values()) // layout.dp) if layout.is_sharded else sum(sizes.values())
    begin = length * dp_rank if layout.is_sharded else 0
    buffers = {kind: torch.full((length,), math.nan) for kind in KINDS}
    fragments, position = [], 0
    for name, size in sizes.items():
        first, last = max(position, begin), min(position + size, begin + length)
        if first < last:
            views = {kind: buffer[first - begin : last - begin] for kind, buffer in buffers.items()}
            is_written = layout.is_sharded or dp_rank == 0
            fragments.append(Fragment(name, first - position, last - first, views, is_written))
        position += size
    boxes = build_boxes(fragments, pieces, cap_elements=cap)
    if seed is not None:
        for key, tensor in boxes.items():
            for offset, view in tensor.boxes.items():
                view.copy_(part_of(canonical(key, seed=seed), offset, tuple(view.shape)))
    return boxes


def part_of(tensor: torch.Tensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    """The box of `tensor`."""
    return tensor[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))]


def wrong_elements(boxes: dict[str, BoxedTensor], *, seed: int = 0) -> int:
    """How many elements of the boxes differ in any bit from the canonical tensors."""
    wrong = 0
    for key, tensor in boxes.items():
        for offset, view in tensor.boxes.items():
            wanted = part_of(canonical(key, seed=seed), offset, tuple(view.shape))
            wrong += int((view.view(torch.int32) != wanted.contiguous().view(torch.int32)).sum())
    return wrong


def _pieces(layout: Layout, tp_rank: int) -> dict[str, list[Piece]]:
    fused = {part: name for name, parts in FUSED.items() for part in parts}
    pieces: dict[str, list[Piece]] = {}
    for name, shape in SHAPES.items():
        offset, size, is_owner = [0] * len(shape), list(shape), tp_rank == 0
        if name in SPLIT_DIM:
            dim, is_owner = SPLIT_DIM[name], True
            size[dim] //= layout.tp
            offset[dim] = size[dim] * tp_rank
        of_local = pieces.setdefault(fused.get(name, name), [])
        start = sum(math.prod(piece.shape) for piece in of_local)
        of_local.append(Piece(name, shape, tuple(offset), tuple(size), start, is_owner))
    return pieces
