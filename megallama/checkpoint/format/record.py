"""The two JSON files of a checkpoint as typed records. docs/checkpoint-format.md is the specification.

Decoding trusts nothing: every type, name, size and range is checked before anybody allocates or opens.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeAlias, TypeGuard

import torch
from blake3 import blake3

from megallama.checkpoint.format.boxes import Ints, cover_problem
from megallama.host.dtypes import FLOATS, dtype_name
from megallama.host.errors import DamagedError, UserError

JSON: TypeAlias = Any
"""None, bool, int, float, str, or list and dict of them: what survives a round trip through a JSON file."""

FORMAT, VERSION = "megallama-checkpoint", 2
ALGORITHMS = {1: "blake2b", 2: "blake3"}
"""The digest of every version that is read, by its key in the manifest; the newest version is written."""
MANIFEST_FILE, INDEX_FILE = "manifest.json", "index.json"
ALIGNMENT_BYTES = 64

_DATA_FILE = re.compile(r"rank-(\d{5,})\.bin", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHECKSUM_KEY = b'"checksum"'


@contextmanager
def damage_at(path: Path) -> Iterator[None]:
    """Adds the checkpoint's path and the remedy to a DamagedError."""
    try:
        yield
    except DamagedError as error:
        raise DamagedError(f"checkpoint {path} is damaged ({error}): use an older one") from error


class Digest(Protocol):
    """A hash that is being computed; `update` lets other threads run meanwhile."""

    def update(self, data: bytes | memoryview, /) -> object:
        """Take some bytes more."""

    def hexdigest(self) -> str:
        """Of all bytes so far, 64 digits."""


def new_digest(algorithm: str = ALGORITHMS[VERSION]) -> Digest:
    """BLAKE3 as `b3sum` prints it, several times as fast as any strong hash of the standard library; for checkpoints of
    version 1 BLAKE2b with 256 bits, as `b2sum -l 256` prints it.
    """
    return blake3() if algorithm == "blake3" else hashlib.blake2b(digest_size=32)


@dataclass(frozen=True)
class FileRecord:
    """One file of the checkpoint beside the manifest."""

    size_bytes: int
    digest: str
    """Of the whole file, hexadecimal."""
    algorithm: str = ALGORITHMS[VERSION]
    """Which digest: one of ALGORITHMS."""


@dataclass(frozen=True)
class CheckpointManifest:
    """What `manifest.json` says: the checkpoint exists once this file stands in the renamed directory."""

    step: int
    model: dict[str, JSON]
    state: dict[str, JSON]
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class BoxRecord:
    """Where one box is stored: row-major, little-endian, without gaps."""

    file: int
    """Number in the name of the data file."""
    position_bytes: int
    """Where the box begins in that file."""
    offset: Ints
    """Where the box begins in the canonical tensor."""
    shape: Ints
    """Extent of the box."""


@dataclass(frozen=True)
class TensorRecord:
    """One canonical tensor; the boxes are an exact partition of it."""

    shape: Ints
    dtype: torch.dtype
    boxes: tuple[BoxRecord, ...]


def data_file(number: int) -> str:
    """Name of the data file of one rank."""
    return f"rank-{number:05d}.bin"


def plain_json(value: Mapping[str, JSON], *, what: str) -> dict[str, JSON]:
    """`value` as it will be read back.

    Raises:
        TypeError: something in it does not survive (tuple, NaN, tensor, key that is not a string).
    """
    try:
        copy = json.loads(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
    except (TypeError, ValueError) as error:
        raise TypeError(f"{what} of a checkpoint must be plain JSON: {error}") from error
    if copy != value:
        changed = sorted(str(key) for key in value if copy.get(key) != value[key])
        raise TypeError(f"{what} of a checkpoint must be plain JSON: {changed} would be read back changed")
    return dict(copy)


def encode_manifest(manifest: CheckpointManifest) -> bytes:
    """The bytes of `manifest.json`; the last entry is the digest of all bytes before it."""
    body = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "model": manifest.model,
        "state": manifest.state,
        "files": {
            name: {"bytes": record.size_bytes, ALGORITHMS[VERSION]: record.digest}
            for name, record in sorted(manifest.files.items())
        },
    }
    text = json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False)
    head = text.removesuffix("\n}").encode() + b",\n "
    return head + _checksum_entry(head, ALGORITHMS[VERSION])


def decode_manifest(raw: bytes) -> CheckpointManifest:
    """The manifest in `raw`.

    Raises:
        DamagedError: it is not one, or was altered.
        UserError: a newer version of the format.
    """
    body = _json_object(raw, MANIFEST_FILE)
    if body.get("format") != FORMAT:
        _damaged(f"format is {body.get('format')!r}, not {FORMAT!r}")
    version = body.get("version")
    algorithm = ALGORITHMS.get(version) if _is_count(version) else None
    if algorithm is None:
        raise UserError(
            f"checkpoint format (version {version}): this program reads up to {VERSION}, update megallama"
        )
    head = raw.rpartition(_CHECKSUM_KEY)[0]
    if raw != head + _checksum_entry(head, algorithm):
        _damaged("checksum does not match the text")
    files = {}
    for name, entry in _mapping(body, "files").items():
        if name != INDEX_FILE and not _DATA_FILE.fullmatch(name):
            _damaged(f"file name {name!r} is not allowed")
        files[name] = _decode_file(name, entry, algorithm)
    if INDEX_FILE not in files:
        _damaged(f"{INDEX_FILE} is not listed")
    if not _is_count(body.get("step")):
        _damaged("step is malformed")
    return CheckpointManifest(body["step"], _mapping(body, "model"), _mapping(body, "state"), files)


def _checksum_entry(head: bytes, algorithm: str) -> bytes:
    digest = new_digest(algorithm)
    digest.update(head)
    return _CHECKSUM_KEY + f': "{digest.hexdigest()}"\n}}\n'.encode()


def _decode_file(name: str, entry: JSON, algorithm: str) -> FileRecord:
    size, digest = (entry.get("bytes"), entry.get(algorithm)) if isinstance(entry, dict) else (None, None)
    if not _is_count(size) or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        _damaged(f"entry of {name} is malformed")
    return FileRecord(size, digest, algorithm)


def encode_index(tensors: Mapping[str, TensorRecord]) -> bytes:
    """The bytes of `index.json`, one line a tensor."""
    lines = []
    for key, tensor in sorted(tensors.items()):
        boxes = [[b.file, b.position_bytes, b.offset, b.shape] for b in tensor.boxes]
        entry = {"dtype": dtype_name(tensor.dtype), "shape": tensor.shape, "boxes": boxes}
        lines.append(f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(entry, separators=(',', ':'))}")
    return ('{"tensors": {\n' + ",\n".join(lines) + "\n}}\n").encode()


def decode_index(raw: bytes, *, files: Mapping[str, FileRecord]) -> dict[str, TensorRecord]:
    """The tensors in `raw`, each one an exact partition into boxes that lie inside of `files`.

    Raises:
        DamagedError: anything else.
    """
    tensors = {}
    for key, entry in _mapping(_json_object(raw, INDEX_FILE), "tensors").items():
        fields = entry if isinstance(entry, dict) else {}
        dtype, boxes = FLOATS.get(str(fields.get("dtype"))), fields.get("boxes")
        if dtype is None or not _is_shape(fields.get("shape")) or not isinstance(boxes, list):
            _damaged(f"entry of {key} is malformed", INDEX_FILE)
        records = tuple(_decode_box(key, box, dtype, files) for box in boxes)
        problem = cover_problem(fields["shape"], [(box.offset, box.shape) for box in records])
        if problem:
            _damaged(f"{key}: {problem}", INDEX_FILE)
        tensors[key] = TensorRecord(tuple(fields["shape"]), dtype, records)
    stored = sum(record.size_bytes for record in files.values())
    if sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values()) > stored:
        _damaged(f"tensors are larger than the files ({stored} bytes)", INDEX_FILE)
    return tensors


def _decode_box(key: str, box: JSON, dtype: torch.dtype, files: Mapping[str, FileRecord]) -> BoxRecord:
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(_is_count(number) for number in box[:2])
        or not all(_is_shape(numbers) for numbers in box[2:])
    ):
        _damaged(f"{key} has a malformed box {box!r}", INDEX_FILE)
    record = BoxRecord(box[0], box[1], tuple(box[2]), tuple(box[3]))
    file = files.get(data_file(record.file))
    end = record.position_bytes + math.prod(record.shape) * dtype.itemsize
    if file is None or end > file.size_bytes or record.position_bytes % ALIGNMENT_BYTES:
        _damaged(
            f"{key}: box at byte {record.position_bytes} of {data_file(record.file)} is not inside it",
            INDEX_FILE,
        )
    return record


def _json_object(raw: bytes, name: str) -> dict[str, JSON]:
    try:
        body = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{name} is not JSON ({error})") from error
    if not isinstance(body, dict):
        _damaged("is not an object", name)
    return body


def _mapping(body: dict[str, JSON], key: str) -> dict[str, JSON]:
    value = body.get(key)
    if not isinstance(value, dict):
        _damaged(f"{key} is malformed")
    return value


def _is_count(value: JSON) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_shape(value: JSON) -> bool:
    return isinstance(value, list) and all(_is_count(number) for number in value)


def _damaged(text: str, name: str = MANIFEST_FILE) -> NoReturn:
    raise DamagedError(f"{name}: {text}")
