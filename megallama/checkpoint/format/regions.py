"""Reading of a part of a stored box: its byte ranges, copied into a tensor."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch

from megallama.checkpoint.format.boxes import Ints
from megallama.checkpoint.format.disk import read_exactly
from megallama.checkpoint.format.record import BoxRecord

MIN_RUN_BYTES = 4096
"""Shorter contiguous runs are not worth a system call each: the rows round them are read whole."""
ROWS_BYTES = 8 * 1024 * 1024
"""Most of such rows in memory at a time, unless one row is larger: a stored box may be as large as its tensor."""


def read_region(fd: int, box: BoxRecord, *, starts: Ints, target: torch.Tensor, name: str) -> None:
    """Fills `target` with the part of the stored `box` that begins at `starts` and has target's shape."""
    if target.device.type == "cpu" and target.is_contiguous():
        _read_part(fd, box, starts, target, name)
        return
    staged = torch.empty(target.shape, dtype=target.dtype)
    _read_part(fd, box, starts, staged, name)
    target.copy_(staged)


def _read_part(fd: int, box: BoxRecord, starts: Ints, target: torch.Tensor, name: str) -> None:
    """`read_region` for contiguous host memory."""
    item_bytes = target.dtype.itemsize
    steps = [math.prod(box.shape[dim + 1 :]) for dim in range(len(box.shape))]
    dims = _outer_dims(box.shape, target.shape)
    run_bytes = math.prod(target.shape[dims:]) * item_bytes
    if dims == 0 or run_bytes >= MIN_RUN_BYTES:
        buffer = bytes_of(target)
        inner = sum(start * step for start, step in zip(starts[dims:], steps[dims:], strict=True))
        for number in range(math.prod(target.shape[:dims])):
            element, rest = inner, number
            for dim in reversed(range(dims)):
                rest, index = divmod(rest, target.shape[dim])
                element += (starts[dim] + index) * steps[dim]
            part = buffer[number * run_bytes : (number + 1) * run_bytes]
            read_exactly(fd, part, position=box.position_bytes + element * item_bytes, name=name)
        return
    # Many short runs: reads of whole rows, then a copy within memory.
    row_bytes = steps[0] * item_bytes
    chunk = min(target.shape[0], max(1, ROWS_BYTES // row_bytes))
    if not target.numel():
        return
    # Its own mapping goes back to the system at once; of buffers from the heap, which lie between what outlives them,
    # the allocator may keep one for every box that is read.
    mapping = mmap.mmap(-1, chunk * row_bytes)
    buffered = torch.frombuffer(mapping, dtype=target.dtype).view(chunk, *box.shape[1:])
    for first in range(0, target.shape[0], chunk):
        rows_wanted = target[first : first + chunk]
        rows = buffered[: rows_wanted.shape[0]]
        position = box.position_bytes + (starts[0] + first) * row_bytes
        read_exactly(fd, bytes_of(rows), position=position, name=name)
        for dim in range(1, target.dim()):
            rows = rows.narrow(dim, starts[dim], target.shape[dim])
        rows_wanted.copy_(rows)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous host tensor."""
    # A single element counts as contiguous whatever its stride, which view() then refuses.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def _outer_dims(shape: Ints, part: Sequence[int]) -> int:
    """How many leading dimensions to iterate so that what remains of `part` is contiguous in `shape`."""
    dims = len(shape)
    while dims and part[dims - 1] == shape[dims - 1]:
        dims -= 1
    # The next dimension may be cut and is still contiguous; beyond it all extents must be 1.
    dims = max(0, dims - 1)
    while dims and part[dims - 1] == 1:
        dims -= 1
    return dims
