"""Writes a checkpoint tensor by tensor or box by box in a single process, with little memory."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch

from megallama.checkpoint.distributed.storage import DataFile
from megallama.checkpoint.format.boxes import DEFAULT_CAP_ELEMENTS, Ints, cover_problem, split_range
from megallama.checkpoint.format.disk import free_bytes, no_space_text, write_file, writing
from megallama.checkpoint.format.protocol import publish, start_temporary, step_name, write_manifest
from megallama.checkpoint.format.record import (
    INDEX_FILE,
    JSON,
    BoxRecord,
    CheckpointManifest,
    FileRecord,
    TensorRecord,
    data_file,
    encode_index,
    plain_json,
)
from megallama.host.dtypes import FLOATS
from megallama.host.errors import UserError

FILE_BYTES = 4 * 1024**3
"""A data file is closed at this size, so that the ranks of a load can share the verification."""


class CheckpointWriter:
    """The checkpoint `<parent>/step-<step>`, in the format that training writes, complete or absent.

        with CheckpointWriter(parent, step=0, model=identity, state={}) as writer:
            writer.write("fp32/decoder.final_layernorm.weight", tensor)
        writer.path  # exists from here on

    Everything goes to a temporary directory, which gets its name when the block ends; an exception in the block
    removes it. A checkpoint of the same step is replaced at that moment.

    Args:
        parent: Directory of checkpoints (`RUN/checkpoints`); made if absent.
        step: Completed optimizer steps; 0 for weights from elsewhere.
        model: `model_identity` of the model.
        state: What else belongs to it; `{}` or anything of the kind for weights alone (no key `progress`).
        size_bytes: Bytes of all tensors where known: a disk that is too full is then told before anything is written.

    Raises:
        UserError: the disk is full or says no.
    """

    def __init__(
        self,
        parent: Path,
        *,
        step: int,
        model: Mapping[str, JSON],
        state: Mapping[str, JSON],
        size_bytes: int = 0,
        file_bytes: int = FILE_BYTES,
    ) -> None:
        self.path = parent / step_name(step)
        self._step = step
        self._model = plain_json(model, what="model")
        self._state = plain_json(state, what="state")
        self._size_bytes = size_bytes
        self._file_bytes = file_bytes
        self._tensors: dict[str, tuple[Ints, torch.dtype, list[BoxRecord]]] = {}
        self._files: dict[str, FileRecord] = {}
        self._file: DataFile | None = None
        self._temporary: Path | None = None

    def __enter__(self) -> CheckpointWriter:
        parent = self.path.parent
        if free_bytes(parent) < self._size_bytes:
            raise UserError(no_space_text(parent, needed_bytes=self._size_bytes, reason="disk is too full"))
        with writing(parent, needed_bytes=self._size_bytes):
            self._temporary = start_temporary(parent, step=self._step)
        return self

    def write(self, key: str, tensor: torch.Tensor) -> None:
        """Adds the whole tensor `<kind>/<canonical name>`; its dtype is kept (training needs fp32: convert before)."""
        assert key not in self._tensors, f"{key} is there already"
        shape = tuple(tensor.shape)
        if not tensor.numel():
            raise ValueError(f"{key} has no elements")
        flat, position = tensor.detach().reshape(-1), 0
        for offset, size in split_range(shape, 0, flat.numel(), cap_elements=DEFAULT_CAP_ELEMENTS):
            length = math.prod(size)
            self.write_box(key, flat[position : position + length].view(size), offset=offset, whole=shape)
            position += length

    def write_box(self, key: str, box: torch.Tensor, *, offset: Sequence[int], whole: Sequence[int]) -> None:
        """Adds the part of tensor `key` (shape `whole`) that begins at `offset`.

        Parts may come in any order, and those of several tensors mixed; at the end they must be exactly the tensors.
        """
        assert self._temporary is not None, "used outside of its with block"
        assert box.dtype in FLOATS.values(), f"{key}: {box.dtype} has no place in a checkpoint"
        shape, dtype, boxes = self._tensors.setdefault(key, (tuple(whole), box.dtype, []))
        assert (shape, dtype) == (tuple(whole), box.dtype), f"{key}: parts disagree about shape or dtype"
        with writing(self._temporary, needed_bytes=self._size_bytes or box.nbytes):
            number, file = self._open_file()
            position = file.append(box)
            boxes.append(BoxRecord(number, position, tuple(offset), tuple(box.shape)))
            if file.position >= self._file_bytes:
                self._close_file()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._temporary is not None
        try:
            if kind is None:
                self._finish(self._temporary)
        finally:
            if self._file is not None:
                self._file.__exit__()
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None

    def _finish(self, temporary: Path) -> None:
        tensors = {}
        for key, (shape, dtype, boxes) in self._tensors.items():
            problem = cover_problem(shape, [(box.offset, box.shape) for box in boxes])
            assert problem is None, f"{key}: {problem}"
            tensors[key] = TensorRecord(shape, dtype, tuple(sorted(boxes, key=lambda box: box.offset)))
        with writing(temporary, needed_bytes=self._size_bytes):
            self._close_file()
            self._files[INDEX_FILE] = write_file(temporary / INDEX_FILE, encode_index(tensors))
            write_manifest(temporary, CheckpointManifest(self._step, self._model, self._state, self._files))
            publish(temporary, step=self._step)

    def _open_file(self) -> tuple[int, DataFile]:
        number = len(self._files)
        if self._file is None:
            assert self._temporary is not None
            self._file = DataFile(self._temporary / data_file(number), backlog=0)
        return number, self._file

    def _close_file(self) -> None:
        if self._file is not None:
            file, self._file, number = self._file, None, len(self._files)
            with file:
                self._files[data_file(number)] = file.close()
