"""Reads a checkpoint in a single process, without a process group; only the requested tensors are in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch

from megallama.checkpoint.format.boxes import Ints
from megallama.checkpoint.format.disk import file_problem, reading
from megallama.checkpoint.format.protocol import check_sizes, read_index, read_manifest
from megallama.checkpoint.format.record import JSON, BoxRecord, TensorRecord, damage_at, data_file
from megallama.checkpoint.format.regions import read_region
from megallama.host.errors import DamagedError


class CheckpointReader:
    """The tensors of the checkpoint in `folder`, whole or in part, by `<kind>/<canonical name>`.

    Opening reads manifest and index, both checked against their digests, and compares the sizes of all files;
    nothing is allocated for a tensor before. Only files of the folder itself are read; symbolic links are refused.

    Args:
        folder: A `step-...` directory; `locate_checkpoint` finds that of a run folder.
        verify: When data files are digested. "lazily": each file before it is first read from; "first": all of
            them at once; "never": only sizes are compared.

    Raises:
        DamagedError: it is not what its writer left.
        UserError: there is no checkpoint, it may not be read, or its format is newer.
    """

    def __init__(self, folder: Path, *, verify: Literal["first", "lazily", "never"] = "lazily") -> None:
        self.folder = folder
        self._unverified: set[str] = set()
        with damage_at(folder):
            self._manifest = read_manifest(folder)
            check_sizes(folder, self._manifest)
            self._tensors = read_index(folder, self._manifest)
            if verify != "never":
                self._unverified = {
                    data_file(box.file) for record in self._tensors.values() for box in record.boxes
                }
            if verify == "first":
                for name in sorted(self._unverified):
                    self._verify_file(name)

    @property
    def step(self) -> int:
        """Completed optimizer steps."""
        return self._manifest.step

    @property
    def model(self) -> dict[str, JSON]:
        """The model's identity (`model_identity`)."""
        return self._manifest.model

    @property
    def state(self) -> dict[str, JSON]:
        """What else the run needs to go on; without `progress` the checkpoint holds weights only."""
        return self._manifest.state

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(record.size_bytes for record in self._manifest.files.values())

    @property
    def kinds(self) -> list[str]:
        """What is stored of each parameter: `fp32`, `exp_avg`, `exp_avg_sq`; only `fp32` for weights alone."""
        return sorted({key.partition("/")[0] for key in self._tensors})

    @property
    def keys(self) -> list[str]:
        """All keys, sorted."""
        return sorted(self._tensors)

    def names(self, *, kind: str = "fp32") -> list[str]:
        """Canonical names of the tensors of one kind, sorted."""
        return [key.removeprefix(f"{kind}/") for key in self.keys if key.startswith(f"{kind}/")]

    def shape(self, key: str) -> Ints:
        """Shape of the whole tensor."""
        return self._tensors[key].shape

    def dtype(self, key: str) -> torch.dtype:
        """Format of its elements."""
        return self._tensors[key].dtype

    def read(
        self, key: str, *, offset: Sequence[int] | None = None, shape: Sequence[int] | None = None
    ) -> torch.Tensor:
        """The tensor `key`, or its part of `shape` that begins at `offset`, on the host.

        Args:
            key: One of `keys`.
            offset: Where the part begins; the origin if not given.
            shape: Extent of the part; up to the end of the tensor if not given.

        Raises:
            DamagedError: a file was altered since it was written.
        """
        record = self._tensors[key]
        begin = tuple(offset) if offset is not None else (0,) * len(record.shape)
        size = tuple(shape) if shape is not None else _rest(record.shape, begin)
        _assert_inside(key, record.shape, begin, size)
        part = torch.empty(size, dtype=record.dtype)
        with damage_at(self.folder):
            for name, boxes in _by_file(record, begin, size):
                if name in self._unverified:
                    self._verify_file(name)
                with reading(self.folder / name) as fd:
                    for box, low, high in boxes:
                        _copy(fd, box, part, low=low, high=high, begin=begin, name=name)
        return part

    def read_all(self, *, kind: str = "fp32") -> Iterator[tuple[str, torch.Tensor]]:
        """The whole tensors of one kind as (canonical name, tensor), one in memory at a time."""
        for name in self.names(kind=kind):
            yield name, self.read(f"{kind}/{name}")

    def _verify_file(self, name: str) -> None:
        problem = file_problem(self.folder / name, self._manifest.files[name])
        if problem:
            raise DamagedError(problem)
        self._unverified.discard(name)


def _rest(whole: Ints, begin: Ints) -> Ints:
    return tuple(extent - start for extent, start in zip(whole, begin, strict=True))


def _assert_inside(key: str, whole: Ints, begin: Ints, size: Ints) -> None:
    assert len(begin) == len(size) == len(whole) and all(
        start >= 0 and length >= 0 and start + length <= extent
        for start, length, extent in zip(begin, size, whole, strict=True)
    ), f"{key}: part {size} at {begin} is outside of {whole}"


_Overlap = tuple[BoxRecord, Ints, Ints]
"""A stored box, and the first and the last-plus-one index of what is wanted of it, in the canonical tensor."""


def _by_file(record: TensorRecord, begin: Ints, size: Ints) -> Iterator[tuple[str, list[_Overlap]]]:
    """Files and overlaps in the order of the bytes."""
    wanted: dict[int, list[_Overlap]] = {}
    end = tuple(start + length for start, length in zip(begin, size, strict=True))
    for box in record.boxes:
        low = tuple(map(max, box.offset, begin))
        high = tuple(min(o + s, stop) for o, s, stop in zip(box.offset, box.shape, end, strict=True))
        if all(first < last for first, last in zip(low, high, strict=True)):
            wanted.setdefault(box.file, []).append((box, low, high))
    for number, boxes in sorted(wanted.items()):
        yield data_file(number), sorted(boxes, key=lambda overlap: overlap[0].position_bytes)


def _copy(
    fd: int, box: BoxRecord, part: torch.Tensor, *, low: Ints, high: Ints, begin: Ints, name: str
) -> None:
    """Fills the region [low, high) of the canonical tensor in `part`, which begins at `begin`, from `box`."""
    target = part[tuple(slice(a - b, c - b) for a, c, b in zip(low, high, begin, strict=True))]
    starts = tuple(a - o for a, o in zip(low, box.offset, strict=True))
    read_region(fd, box, starts=starts, target=target, name=name)
