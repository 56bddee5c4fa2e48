"""Plans of attention: which queries meet which keys, as a short list of squares and rectangles instead of a mask.

Documents are contiguous and attention never crosses one. On the diagonal a chunk therefore splits into one causal
square a document. Off it, only the document that covers the first query of a chunk reaches back: its queries are
a prefix of the chunk and its keys a suffix of the earlier block, so what remains is a rectangle with no mask at
all. Non-square causal kernels are never used: torch aligns their mask top-left on CPU and bottom-right on CUDA.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from megallama.kernels.attention.zigzag import Stretch, stretches

DocumentStarts = tuple[tuple[int, ...], ...]
"""For every sequence of a micro-batch the positions, in the whole sequence, at which a document starts; first 0."""

MAX_PACKED_LENGTH = 256
"""Longer documents are worth a kernel call of their own; shorter ones share calls."""
MIN_PACKED_LENGTH = 16


@dataclass(frozen=True)
class Rectangle:
    """Queries and keys that meet, in positions of the local query block and of the given key block."""

    rows: slice
    """Sequences of the micro-batch."""
    q: slice
    k: slice
    is_causal: bool
    """A square with its upper triangle masked; else every query meets every key."""


@dataclass(frozen=True)
class Pack:
    """Short documents of about one length, computed side by side. Token (s, b) has the flat index s x B + b."""

    q_index: torch.Tensor
    """int64 [tokens]: queries, document after document."""
    k_index: torch.Tensor
    """int64 [tokens]: their keys."""
    slots: torch.Tensor
    """int64 [tokens]: where they stand in the padded [count x length]."""
    count: int
    """Documents."""
    length: int
    """The longest of them."""
    offsets: torch.Tensor
    """int32 [count + 1]: where each begins among the tokens."""


@dataclass(frozen=True)
class Plan:
    """All of one attention pass over one key block."""

    rectangles: tuple[Rectangle, ...]
    packs: tuple[Pack, ...]
    is_disjoint: bool
    """No query and no key occurs twice, so nothing has to be merged or summed."""

    @property
    def is_one_square(self) -> bool:
        """One causal call over all there is."""
        return self.is_disjoint and not self.packs and len(self.rectangles) == 1


@dataclass(frozen=True)
class Block:
    """What a plan is for; equal blocks share one plan over all layers of a model."""

    documents: DocumentStarts | None
    """None: every sequence is one document."""
    batch: int
    seq_len: int
    """Positions of the whole sequence."""
    cp_size: int
    cp_rank: int
    is_packing_all: bool
    """Whether the kernel takes documents of any lengths in one call."""
    device: torch.device


@lru_cache(maxsize=64)
def plan_whole_keys(block: Block) -> Plan:
    """This rank's queries against the keys of the whole sequence in natural order."""
    found: list[Rectangle] = []
    offset = 0
    for begin, end in stretches(block.seq_len, cp_size=block.cp_size, cp_rank=block.cp_rank):
        found += _reach_back(block, (begin, end), (0, begin), offset, 0)
        found += _diagonal(block, (begin, end), offset, begin)
        offset += end - begin
    return _plan(block, found, is_disjoint=block.cp_size == 1)


@lru_cache(maxsize=256)
def plan_shard_keys(block: Block, source: int) -> Plan:
    """This rank's queries against the keys that rank `source` holds."""
    found: list[Rectangle] = []
    own = stretches(block.seq_len, cp_size=block.cp_size, cp_rank=block.cp_rank)
    theirs = stretches(block.seq_len, cp_size=block.cp_size, cp_rank=source)
    for q_offset, (begin, end) in _with_offsets(own):
        for k_offset, (key_begin, key_end) in _with_offsets(theirs):
            if key_begin == begin:
                found += _diagonal(block, (begin, end), q_offset, k_offset)
            elif key_end <= begin:
                found += _reach_back(block, (begin, end), (key_begin, key_end), q_offset, k_offset)
    return _plan(block, _join(found), is_disjoint=False)


def _with_offsets(stretches: Sequence[Stretch]) -> Iterator[tuple[int, Stretch]]:
    offset = 0
    for begin, end in stretches:
        yield offset, (begin, end)
        offset += end - begin


def _rows(block: Block) -> list[tuple[slice, tuple[int, ...]]]:
    """Sequences that are cut alike, with the cut."""
    if block.documents is None or len(set(block.documents)) == 1:
        starts = (0,) if block.documents is None else block.documents[0]
        return [(slice(0, block.batch), starts)]
    assert len(block.documents) == block.batch, (len(block.documents), block.batch)
    return [(slice(row, row + 1), starts) for row, starts in enumerate(block.documents)]


def _diagonal(block: Block, span: Stretch, q_offset: int, k_offset: int) -> list[Rectangle]:
    """A chunk against itself: one causal square a document."""
    begin, end = span
    found = []
    for rows, starts in _rows(block):
        inner = starts[bisect_right(starts, begin) : bisect_right(starts, end - 1)]
        cuts = (begin, *inner, end)
        for first, last in zip(cuts, cuts[1:], strict=False):
            q = slice(q_offset + first - begin, q_offset + last - begin)
            k = slice(k_offset + first - begin, k_offset + last - begin)
            found.append(Rectangle(rows=rows, q=q, k=k, is_causal=True))
    return found


def _reach_back(block: Block, span: Stretch, keys: Stretch, q_offset: int, k_offset: int) -> list[Rectangle]:
    """A chunk against earlier keys: the part of the document at its start that lies among them."""
    begin, end = span
    found = []
    for rows, starts in _rows(block):
        document = bisect_right(starts, begin) - 1
        last = min(end, starts[document + 1]) if document + 1 < len(starts) else end
        first_key = max(keys[0], starts[document])
        if first_key < keys[1]:
            q = slice(q_offset, q_offset + last - begin)
            k = slice(k_offset + first_key - keys[0], k_offset + keys[1] - keys[0])
            found.append(Rectangle(rows=rows, q=q, k=k, is_causal=False))
    return found


def _join(rectangles: Sequence[Rectangle]) -> list[Rectangle]:
    """Rectangles that touch along a whole side become one."""
    joined: list[Rectangle] = []
    for new in rectangles:
        old = joined[-1] if joined else None
        if old is not None and old.rows == new.rows and not (old.is_causal or new.is_causal):
            if old.k == new.k and old.q.stop == new.q.start:
                joined[-1] = Rectangle(new.rows, slice(old.q.start, new.q.stop), new.k, False)
                continue
            if old.q == new.q and old.k.stop == new.k.start:
                joined[-1] = Rectangle(new.rows, new.q, slice(old.k.start, new.k.stop), False)
                continue
        joined.append(new)
    return joined


def _plan(block: Block, found: Sequence[Rectangle], *, is_disjoint: bool) -> Plan:
    limit = block.seq_len if block.is_packing_all else MAX_PACKED_LENGTH
    alone: list[Rectangle] = []
    by_length: dict[int, list[Rectangle]] = {}
    for rectangle in found:
        length = rectangle.q.stop - rectangle.q.start
        if not rectangle.is_causal or length > limit:
            alone.append(rectangle)
            continue
        # Padded to a power of two, a document costs less than four times its own triangle.
        padded = max(MIN_PACKED_LENGTH, 1 << (length - 1).bit_length())
        by_length.setdefault(0 if block.is_packing_all else padded, []).append(rectangle)
    packs = []
    for short in by_length.values():
        if len(short) == 1:
            alone += short
        else:
            packs.append(_pack(block, short))
    return Plan(rectangles=tuple(alone), packs=tuple(packs), is_disjoint=is_disjoint)


def _pack(block: Block, short: Sequence[Rectangle]) -> Pack:
    squares = [(row, s.q, s.k) for s in short for row in range(s.rows.start, s.rows.stop)]
    length = max(q.stop - q.start for _, q, _ in squares)
    q_index, k_index, slots, offsets = [], [], [], [0]
    for number, (row, q, k) in enumerate(squares):
        size = q.stop - q.start
        q_index.append(torch.arange(q.start, q.stop) * block.batch + row)
        k_index.append(torch.arange(k.start, k.stop) * block.batch + row)
        slots.append(torch.arange(size) + number * length)
        offsets.append(offsets[-1] + size)
    return Pack(
        q_index=to_device(torch.cat(q_index), block.device),
        k_index=to_device(torch.cat(k_index), block.device),
        slots=to_device(torch.cat(slots), block.device),
        count=len(squares),
        length=length,
        offsets=to_device(torch.tensor(offsets, dtype=torch.int32), block.device),
    )


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`; to a GPU from page-locked memory, which does not wait for what the GPU has still to do."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
