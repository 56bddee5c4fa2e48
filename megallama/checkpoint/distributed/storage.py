"""The storage reader and writer of torch.distributed.checkpoint: raw data files per rank and a JSON index.

torch's own file storage is not used: its metadata is a pickle, and its reader loads every stored box
whole. Here a reader fetches only the byte ranges that it needs.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future as TorchFuture

from megallama.checkpoint.distributed.planner import metadata_of
from megallama.checkpoint.format.disk import LOCAL_DISK, Disk, reading, write_file, writing
from megallama.checkpoint.format.record import (
    ALIGNMENT_BYTES,
    INDEX_FILE,
    BoxRecord,
    FileRecord,
    TensorRecord,
    data_file,
    encode_index,
    new_digest,
)
from megallama.checkpoint.format.regions import bytes_of, read_region
from megallama.topology.agreement import portable_errors

T = TypeVar("T")

WRITE_BYTES = 8 * 1024 * 1024
"""One system call; shorter boxes are gathered up to this."""
GATHERED_BYTES = 1024 * 1024
"""Boxes shorter than this are gathered: a memory copy costs less than a system call and two threads that meet."""
PART_BYTES = 256 * 1024 * 1024
"""What is worth a data file, and a thread, of its own."""
MAX_PARTS = 4
"""Data files that one rank writes at a time: one thread writes less than a good disk takes."""
_BACKLOG = 2
"""Blocks that may be written before they are digested."""


class BoxWriter(StorageWriter):
    """Writes this rank's boxes to files of its own in an existing directory; rank 0 adds the index.

    `files` has this rank's files afterwards: its data files, and the index on rank 0.
    """

    def __init__(self, directory: Path, *, world_size: int, disk: Disk) -> None:
        self._disk = disk
        self.directory = directory
        self.world_size = world_size
        self.files: dict[str, FileRecord] = {}
        self.number = 0

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path will do."""
        return True

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Takes this rank's number in the group."""
        self.number = int(kwargs["rank"])

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Nothing to add."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        """Writes and digests every box from memory, then waits for the disk.

        Raises:
            UserError: the disk is full or says no.
        """
        with portable_errors():
            results = self._write(plan, planner) if plan.items else []
        future: TorchFuture[list[WriteResult]] = TorchFuture()
        future.set_result(results)
        return future

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        needed = sum(_padded_bytes(item) for item in plan.items)
        parts = split_evenly(plan.items, [_padded_bytes(item) for item in plan.items])
        # The first one has the number of the rank, and no two ranks share a number.
        numbers = [self.number + part * self.world_size for part in range(len(parts))]
        with ThreadPoolExecutor(max_workers=len(parts), thread_name_prefix="checkpoint-write") as writers:
            written = writers.map(
                lambda number, items: self._write_file(number, items, planner, needed), numbers, parts
            )
            return [result for results in written for result in results]

    def _write_file(
        self, number: int, items: Sequence[WriteItem], planner: SavePlanner, needed: int
    ) -> list[WriteResult]:
        results = []
        path = self.directory / data_file(number)
        with writing(path, needed_bytes=needed), DataFile(path, disk=self._disk) as file:
            for item in items:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, torch.Tensor)
                position = file.append(tensor)
                box = BoxRecord(number, position, tuple(item.index.offset or ()), tuple(tensor.shape))
                results.append(WriteResult(item.index, tensor.nbytes, box))
            self.files[path.name] = file.close()
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Rank 0 writes the index of all ranks' boxes."""
        boxes: defaultdict[str, list[BoxRecord]] = defaultdict(list)
        for result in (result for of_rank in results for result in of_rank):
            boxes[result.index.fqn].append(result.storage_data)
        tensors = {}
        for key, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            in_order = tuple(sorted(boxes[key], key=lambda box: box.offset))
            tensors[key] = TensorRecord(tuple(stored.size), stored.properties.dtype, in_order)
        self.files[INDEX_FILE] = write_file(
            self.directory / INDEX_FILE, encode_index(tensors), disk=self._disk
        )


class DataFile:
    """A data file being written: aligned boxes, digested in a second thread while they are written.

    Args:
        path: The file; it must not exist.
        backlog: Blocks that may be written before they are digested. 0: the memory of a tensor is free to be
            changed once `append` has returned.
        disk: Writes the bytes.
    """

    def __init__(self, path: Path, *, backlog: int = _BACKLOG, disk: Disk = LOCAL_DISK) -> None:
        self._disk = disk
        self.position = 0
        self._backlog = backlog
        self._digest = new_digest()
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._hasher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-digest")
        self._behind: deque[Future[object]] = deque()
        self._gathered = bytearray()

    def __enter__(self) -> DataFile:
        return self

    def append(self, tensor: torch.Tensor) -> int:
        """Adds the bytes of `tensor` and padding; returns where it begins."""
        begin = self.position
        # A box on an accelerator is staged here, one at a time.
        raw = bytes_of(tensor.detach().cpu().contiguous())
        padding = bytes(-len(raw) % ALIGNMENT_BYTES)
        if len(raw) >= GATHERED_BYTES:
            self._write_gathered()
            for start in range(0, len(raw), WRITE_BYTES):
                self._write_block(raw[start : start + WRITE_BYTES])
        else:
            self._gathered += raw
        self._gathered += padding
        if len(self._gathered) >= WRITE_BYTES:
            self._write_gathered()
        self.position += len(raw) + len(padding)
        return begin

    def _write_gathered(self) -> None:
        if self._gathered:
            gathered, self._gathered = self._gathered, bytearray()
            self._write_block(memoryview(gathered))

    def _write_block(self, data: memoryview) -> None:
        self._behind.append(self._hasher.submit(self._digest.update, data))
        self._disk.write(self._fd, data)
        if len(self._behind) > self._backlog:
            self._behind.popleft().result()

    def close(self) -> FileRecord:
        """Waits until everything is on the disk."""
        self._write_gathered()
        os.fsync(self._fd)
        while self._behind:
            self._behind.popleft().result()
        return FileRecord(self.position, self._digest.hexdigest())

    def __exit__(self, *_: object) -> None:
        self._hasher.shutdown()
        os.close(self._fd)


def split_evenly(items: Sequence[T], sizes: Sequence[int]) -> list[Sequence[T]]:
    """`items` in their order as at most MAX_PARTS runs of about equal size, none shorter than PART_BYTES."""
    total = sum(sizes)
    count = max(1, min(MAX_PARTS, total // PART_BYTES))
    ends, done = [0], 0
    for index, size in enumerate(sizes, start=1):
        done += size
        if done * count >= total * len(ends):
            ends.append(index)
    ends[-1] = len(items)
    return [items[begin:end] for begin, end in itertools.pairwise(ends)]


class BoxReader(StorageReader):
    """Reads byte ranges of the data files in `directory` as `tensors`, its decoded index, says."""

    def __init__(self, directory: Path, *, tensors: dict[str, TensorRecord]) -> None:
        self.directory = directory
        self.tensors = tensors

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path will do."""
        return True

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between loads."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index in torch's terms."""
        return metadata_of(self.tensors)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to add."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> TorchFuture[None]:
        """Fills the boxes of this rank, file by file in the order of the bytes.

        Raises:
            DamagedError: a file is missing or ends too early.
        """
        with portable_errors():
            self._read(plan, planner)
        future: TorchFuture[None] = TorchFuture()
        future.set_result(None)
        return future

    def _read(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        by_file: defaultdict[int, list[tuple[BoxRecord, ReadItem]]] = defaultdict(list)
        for item in plan.items:
            box = self._stored_box(item.storage_index)
            by_file[box.file].append((box, item))
        for number, pairs in sorted(by_file.items()):
            path = self.directory / data_file(number)
            with reading(path) as fd:
                for box, item in sorted(pairs, key=lambda pair: pair[0].position_bytes):
                    target = planner.resolve_tensor(item).detach()
                    read_region(fd, box, starts=tuple(item.storage_offsets), target=target, name=path.name)
                    planner.commit_tensor(item, target)

    def _stored_box(self, index: MetadataIndex) -> BoxRecord:
        # The position in the list of chunks, which metadata_of took over from the list of boxes.
        assert index.index is not None and index.offset is not None, index
        box = self.tensors[index.fqn].boxes[index.index]
        assert box.offset == tuple(index.offset), (box, index)
        return box


def _padded_bytes(item: WriteItem) -> int:
    data = item.tensor_data
    assert data is not None, item
    size: int = math.prod(data.chunk.sizes) * data.properties.dtype.itemsize
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
