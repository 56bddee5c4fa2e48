"""How torch.distributed.checkpoint reaches the disk: one raw data file a rank and a JSON index.

torch's own file storage is not used: its metadata is a pickle, and its reader loads every stored box
whole. Here a reader fetches only the byte ranges that it needs.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from megallama.checkpoint.agreement import portable_errors
from megallama.checkpoint.disk import reading, write_all, write_file, writing
from megallama.checkpoint.planner import metadata_of
from megallama.checkpoint.record import (
    ALIGNMENT_BYTES,
    INDEX_FILE,
    BoxRecord,
    FileRecord,
    TensorRecord,
    data_file,
    encode_index,
    new_digest,
)
from megallama.checkpoint.regions import bytes_of, read_region

_WRITE_BYTES = 8 * 1024 * 1024
_MIN_THREAD_BYTES = 256 * 1024
"""Handing less than this to the digest thread costs more time than it saves."""


class BoxWriter(StorageWriter):
    """Writes this rank's boxes to its own file in an existing directory; rank 0 adds the index.

    `files` has this rank's files afterwards: at most its data file, and the index on rank 0.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
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

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes and digests every box from memory, then waits for the disk.

        Raises:
            UserError: the disk is full or says no.
        """
        with portable_errors():
            results = self._write(plan, planner) if plan.items else []
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        results = []
        path = self.directory / data_file(self.number)
        needed = sum(_padded_bytes(item.tensor_data) for item in plan.items)
        with writing(path, needed_bytes=needed), DataFile(path) as file:
            for item in plan.items:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, torch.Tensor)
                position = file.append(tensor)
                box = BoxRecord(self.number, position, tuple(item.index.offset or ()), tuple(tensor.shape))
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
        self.files[INDEX_FILE] = write_file(self.directory / INDEX_FILE, encode_index(tensors))


class DataFile:
    """A data file being written: aligned boxes, digested in a second thread while they are written."""

    def __init__(self, path: Path) -> None:
        self.position = 0
        self.digest = new_digest()
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self.hasher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-digest")

    def __enter__(self) -> DataFile:
        return self

    def append(self, tensor: torch.Tensor) -> int:
        """Adds the bytes of `tensor` and padding; returns where it begins."""
        begin = self.position
        # A box on an accelerator is staged here, one at a time.
        raw = bytes_of(tensor.detach().cpu().contiguous())
        for start in range(0, len(raw), _WRITE_BYTES):
            self._add(raw[start : start + _WRITE_BYTES])
        self._add(memoryview(bytes(-self.position % ALIGNMENT_BYTES)))
        return begin

    def _add(self, data: memoryview) -> None:
        if len(data) < _MIN_THREAD_BYTES:
            self.digest.update(data)
            write_all(self.fd, data)
        else:
            digested = self.hasher.submit(self.digest.update, data)
            try:
                write_all(self.fd, data)
            finally:
                digested.result()
        self.position += len(data)

    def close(self) -> FileRecord:
        """Waits until everything is on the disk."""
        os.fsync(self.fd)
        return FileRecord(self.position, self.digest.hexdigest())

    def __exit__(self, *_: object) -> None:
        self.hasher.shutdown()
        os.close(self.fd)


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

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fills the boxes of this rank, file by file in the order of the bytes.

        Raises:
            DamagedError: a file is missing or ends too early.
        """
        with portable_errors():
            self._read(plan, planner)
        future: Future[None] = Future()
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


def _padded_bytes(data: Any) -> int:
    size: int = math.prod(data.chunk.sizes) * data.properties.dtype.itemsize
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
