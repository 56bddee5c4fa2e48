"""Boxes: the parts of canonical tensors that one rank holds, as views of its own memory.

ZeRO gives a rank flat ranges of flattened local parameters; the model layout says which canonical box a
range of a local parameter is. Where the two meet, a few n-dimensional boxes of canonical tensors remain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # keeps megatron-core out of programs that only read a checkpoint
    from megallama.engine.fragment import Fragment
    from megallama.model.layout import Piece

Ints = tuple[int, ...]

DEFAULT_CAP_ELEMENTS = 2 * 1024 * 1024
"""Largest box of a save, in elements (8 MiB of fp32): what a GPU save stages on the host at a time."""


@dataclass(frozen=True)
class BoxedTensor:
    """The boxes of one canonical tensor that this rank holds."""

    key: str
    """`<kind>/<canonical name>`, for example `fp32/decoder.final_layernorm.weight`."""
    global_shape: Ints
    """Shape of the whole canonical tensor."""
    dtype: torch.dtype
    """Format of the elements."""
    is_owner: bool
    """Whether this rank writes its boxes; every rank reads its boxes."""
    boxes: dict[Ints, torch.Tensor]
    """Offset in the canonical tensor -> contiguous view of that box."""


def split_range(
    shape: Sequence[int], begin: int, end: int, *, cap_elements: int | None = None
) -> Iterator[tuple[Ints, Ints]]:
    """The flat range [begin, end) of a row-major tensor of `shape` as (offset, box shape), in flat order.

    Every box is contiguous in the flat range. Without a cap there are at most 2 x ndim - 1 of them; with
    one, none has more than `cap_elements` elements.
    """
    assert 0 <= begin <= end <= math.prod(shape), (shape, begin, end)
    assert cap_elements is None or cap_elements > 0, cap_elements
    if not shape:
        if begin < end:
            yield (), ()
        return
    # Elements in one step along each dimension.
    steps = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    position = begin
    while position < end:
        room = end - position if cap_elements is None else min(end - position, cap_elements)
        # The outermost dimension along which a whole step starts here and fits.
        dim = next(dim for dim, step in enumerate(steps) if position % step == 0 and step <= room)
        index = position // steps[dim] % shape[dim]
        rows = min(room // steps[dim], shape[dim] - index)
        offset = tuple(position // step % size for step, size in zip(steps, shape, strict=True))
        yield offset, (1,) * dim + (rows,) + tuple(shape[dim + 1 :])
        position += rows * steps[dim]


def build_boxes(
    fragments: Iterable[Fragment],
    layout: Mapping[str, Sequence[Piece]],
    *,
    cap_elements: int | None = DEFAULT_CAP_ELEMENTS,
) -> dict[str, BoxedTensor]:
    """What this rank holds, by `<kind>/<canonical name>` with kind `fp32`, `exp_avg`, `exp_avg_sq`.

    No element is copied: writing to a box writes the optimizer state.
    """
    tensors: dict[str, BoxedTensor] = {}
    for fragment in fragments:
        for piece in layout[fragment.param_name]:
            begin = max(fragment.start, piece.start)
            end = min(fragment.start + fragment.numel, piece.start + math.prod(piece.shape))
            if begin >= end:
                continue
            position = begin - fragment.start
            parts = split_range(
                piece.shape, begin - piece.start, end - piece.start, cap_elements=cap_elements
            )
            for offset, shape in parts:
                place = tuple(base + inner for base, inner in zip(piece.offset, offset, strict=True))
                for kind, view in fragment.views.items():
                    tensor = _entry(tensors, f"{kind}/{piece.key}", fragment, piece, view.dtype)
                    assert place not in tensor.boxes, f"{tensor.key}: two boxes at {place}"
                    tensor.boxes[place] = view.narrow(0, position, math.prod(shape)).view(shape)
                position += math.prod(shape)
    return tensors


def _entry(
    tensors: dict[str, BoxedTensor], key: str, fragment: Fragment, piece: Piece, dtype: torch.dtype
) -> BoxedTensor:
    is_owner = piece.is_owner and fragment.is_written
    tensor = tensors.setdefault(key, BoxedTensor(key, piece.global_shape, dtype, is_owner, {}))
    assert (tensor.global_shape, tensor.dtype, tensor.is_owner) == (piece.global_shape, dtype, is_owner), (
        f"{key}: two local parameters disagree about shape, dtype or ownership"
    )
    return tensor


def cover_problem(shape: Sequence[int], boxes: Sequence[tuple[Ints, Ints]]) -> str | None:
    """Why `boxes` (offset, box shape) are no exact partition of a tensor of `shape`, or None if they are."""
    for offset, size in boxes:
        if not len(offset) == len(size) == len(shape):
            return f"box at {list(offset)} has another number of dimensions than shape {list(shape)}"
        if any(o < 0 or s < 1 or o + s > g for o, s, g in zip(offset, size, shape, strict=True)):
            return f"box {list(size)} at {list(offset)} is outside of shape {list(shape)}"
    covered, total = sum(math.prod(size) for _, size in boxes), math.prod(shape)
    if covered != total:
        return f"boxes hold {covered} of {total} elements"
    # As many elements as the tensor has: a hole can only hide behind an overlap. Sweep along the longest
    # dimension and compare each box with those still open.
    sweep = max(range(len(shape)), key=lambda dim: shape[dim], default=None)
    if sweep is None:
        return None
    still_open: list[tuple[Ints, Ints]] = []
    for offset, size in sorted(boxes, key=lambda box: box[0][sweep]):
        still_open = [box for box in still_open if box[0][sweep] + box[1][sweep] > offset[sweep]]
        for other, other_size in still_open:
            if _overlaps(offset, size, other, other_size):
                return f"boxes at {list(other)} and {list(offset)} overlap"
        still_open.append((offset, size))
    return None


def _overlaps(offset: Ints, size: Ints, other: Ints, other_size: Ints) -> bool:
    return all(
        a < b + length_b and b < a + length_a
        for a, length_a, b, length_b in zip(offset, size, other, other_size, strict=True)
    )
