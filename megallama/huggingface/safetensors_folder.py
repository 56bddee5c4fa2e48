"""The safetensors files of a Hugging Face model folder: read in parts, written tensor by tensor."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from megallama.checkpoint.format.boxes import Ints
from megallama.checkpoint.format.disk import LOCAL_DISK, writing
from megallama.checkpoint.format.regions import bytes_of
from megallama.host.dtypes import FLOATS, dtype_name
from megallama.host.errors import UserError
from megallama.huggingface.model_folder import read_json

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": FLOATS["float32"], "F16": FLOATS["float16"], "BF16": FLOATS["bfloat16"]}
"""Formats that are read and written, by their names in a file."""

_PLAIN_NAME = re.compile(r"[\w.-]+\.safetensors")
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")


Folder = TypeVar("Folder", bound="SafetensorsFolder")


class SafetensorsFolder:
    """The tensors of a model folder (one file, or several with an index), read row by row.

    Headers and the sizes of the files are checked at once; of the data only what is asked for is read.

    Args:
        folder: The folder.
        may_lack: Which tensors the index may name without any file that holds them.

    Raises:
        UserError: no safetensors files, a file missing or damaged, or a format other than fp32, fp16, bf16.
    """

    def __init__(self, folder: Path, *, may_lack: Callable[[str], bool] = lambda name: False) -> None:
        self.folder = folder
        self.shapes: dict[str, Ints] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()
        try:
            for file, listed in _files_of(folder).items():
                needed = [name for name in listed if not may_lack(name)]
                if needed or not listed or (folder / file).is_file():
                    self._open(file, needed)
        except BaseException:
            self.close()
            raise

    def __enter__(self: Folder) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        self._stack.close()

    def rows(self, name: str, *, start: int, count: int, columns: tuple[slice, ...] = ()) -> torch.Tensor:
        """Rows `start` to `start + count` of a tensor, or `columns` of them, in its own format."""
        place = (slice(start, start + count), *columns)
        try:
            part: torch.Tensor = self._files[name].get_slice(name)[place]
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self.folder}: {name} cannot be read ({error}): copy the folder again"
            ) from error
        return part

    def _open(self, file: str, names: Sequence[str]) -> None:
        path = self.folder / file
        if not path.is_file():
            raise UserError(f"{path} is missing: copy or download the folder again, it must be whole")
        try:
            opened = self._stack.enter_context(safe_open(path, framework="pt"))
            held = list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is damaged ({path.stat().st_size} bytes; {error}): copy or download it again"
            ) from error
        absent = sorted(set(names) - set(held))
        if absent:
            raise UserError(
                f"{path} lacks {_some(absent)}, which {INDEX_FILE} says it holds: download both again"
            )
        for name in held:
            if name in self._files:
                raise UserError(f"{path} holds {name} a second time: download the folder again")
            part = opened.get_slice(name)
            dtype = DTYPES.get(part.get_dtype())
            if dtype is None:
                raise UserError(
                    f"{path}: {name} is {part.get_dtype()}, only {', '.join(DTYPES)} are supported:"
                    " convert the model to bf16 first"
                )
            self._files[name], self.shapes[name], self.dtypes[name] = opened, tuple(part.get_shape()), dtype


def is_whole_model(folder: Path) -> bool:
    """Whether weights of a whole model lie in `folder`, of a form that is read or not."""
    return any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE)) or any(
        not file.name.startswith("adapter_") for pattern in _PICKLES for file in folder.glob(pattern)
    )


def _files_of(folder: Path) -> dict[str, list[str]]:
    """File name -> names of the tensors that it must hold (whatever else it holds is taken too)."""
    if (folder / INDEX_FILE).exists():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder / INDEX_FILE} has no weight_map: copy or download it again")
        files: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file):
                raise UserError(
                    f"{folder / INDEX_FILE}: {file!r} is no name of a .safetensors file in the folder"
                )
            files.setdefault(file, []).append(name)
        return files
    if (folder / SINGLE_FILE).exists():
        return {SINGLE_FILE: []}
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} holds pickled weights ({_some(pickles)}) and no {SINGLE_FILE}: they are not read,"
            " because unpickling can run any code; download the safetensors form of the model, or load it in"
            " transformers in an environment you trust and save it with save_pretrained"
        )
    raise UserError(
        f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}: give the folder of a Hugging Face model"
    )


def _some(names: Sequence[str], limit: int = 4) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


@dataclass(frozen=True)
class TensorToWrite:
    """One tensor of a file that is to be written."""

    shape: Ints
    blocks: Callable[[], Iterator[torch.Tensor]]
    """Its rows in order, in parts of any height."""


def write_safetensors(
    folder: Path, tensors: Mapping[str, TensorToWrite], *, dtype: torch.dtype, max_shard_bytes: int
) -> list[str]:
    """Write `tensors` into one file, or into several with an index where they exceed `max_shard_bytes`; their names.

    A tensor larger than a file gets a file of its own. No more than one block is held.

    Raises:
        UserError: the disk is full or says no.
    """
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    total = sum(math.prod(tensor.shape) for tensor in tensors.values())
    files = [SINGLE_FILE]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    with writing(folder, needed_bytes=total * dtype.itemsize):
        for file, names in zip(files, shards, strict=True):
            _write_file(folder / file, {name: tensors[name] for name in names}, dtype=dtype)
        if len(shards) > 1:
            weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            metadata = {"total_size": total * dtype.itemsize, "total_parameters": total}
            text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2)
            (folder / INDEX_FILE).write_text(text + "\n", encoding="utf-8")
            files.append(INDEX_FILE)
    return files


def _write_file(path: Path, tensors: Mapping[str, TensorToWrite], *, dtype: torch.dtype) -> None:
    """The format: length of the header (8 bytes, little-endian), the header in JSON, the tensors without gaps."""
    format_name = next(name for name, known in DTYPES.items() if known == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        end = position + math.prod(tensor.shape) * dtype.itemsize
        header[name] = {"dtype": format_name, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        LOCAL_DISK.write(fd, memoryview(len(text).to_bytes(8, "little") + text))
        for name, tensor in tensors.items():
            written = 0
            for block in tensor.blocks():
                cast = block.to(dtype)
                if not cast.isfinite().all() and block.isfinite().all():
                    raise UserError(f"{name} has values beyond {dtype_name(dtype)}: use --dtype bf16")
                written += cast.numel()
                LOCAL_DISK.write(fd, bytes_of(cast.contiguous()))
            assert written == math.prod(tensor.shape), name
        os.fsync(fd)
    finally:
        os.close(fd)
