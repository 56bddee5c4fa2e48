"""Prepared token files seen from outside: manifest and cheap checks, without torch or megatron-core.

A prepared dataset is `<prefix>.bin` (token ids), `<prefix>.idx` (megatron-core's index: magic, version,
dtype code, counts, then length and byte pointer of each sequence, then the first sequence of each
document) and, where megallama wrote it, `<prefix>.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO

from megallama.host.errors import UserError

MANIFEST_FORMAT = "megallama-tokens"
MANIFEST_VERSION = 1
SUFFIXES = (".bin", ".idx", ".json")

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
# megatron-core 0.16.1, core/datasets/indexed_dataset.py, DType; floats cannot be token ids.
_ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
_PREPARE_AGAIN = "prepare or copy it again"


@dataclass(frozen=True)
class Manifest:
    """What `megallama prepare` says about a token file."""

    tokenizer_name: str
    tokenizer_sha256: str
    vocab_size: int
    """Token ids of that tokenizer; every id in the file is below it."""
    eod_id: int
    """The token that closes each document."""
    documents: int
    tokens: int
    bin_bytes: int
    bin_sha256: str
    idx_sha256: str


def write_manifest(prefix: str | Path, manifest: Manifest) -> None:
    """Writes `<prefix>.json`."""
    content = {"format": MANIFEST_FORMAT, "version": MANIFEST_VERSION, **asdict(manifest)}
    with open(f"{prefix}.json", "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_manifest(prefix: str | Path) -> Manifest | None:
    """The manifest of a token file; None where there is none, as beside files that Megatron made.

    Raises:
        UserError: it is there but cannot be understood.
    """
    path = Path(f"{prefix}.json")
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"manifest {path} cannot be read ({error}): {_PREPARE_AGAIN}") from error
    if not isinstance(content, dict) or content.get("format") != MANIFEST_FORMAT:
        raise UserError(
            f"{path} is no manifest of a token file (format is not {MANIFEST_FORMAT!r}): move it away"
        )
    if content.get("version") != MANIFEST_VERSION:
        raise UserError(
            f"manifest {path} has version {content.get('version')}, this megallama reads {MANIFEST_VERSION}:"
            " prepare it again or use the megallama that wrote it"
        )
    kinds = {field.name: int if field.type == "int" else str for field in fields(Manifest)}
    wrong = [name for name, kind in kinds.items() if type(content.get(name)) is not kind]
    if wrong:
        raise UserError(f"manifest {path} lacks or garbles {', '.join(wrong)}: {_PREPARE_AGAIN}")
    return Manifest(**{name: content[name] for name in kinds})


def check_token_file(prefix: str | Path, *, checksums: bool = False) -> list[str]:
    """Problems of the token file at `prefix`; none: it can be opened.

    Reads a few hundred bytes, so it suits a login node; `checksums` reads everything and compares
    with the manifest.
    """
    missing = [suffix for suffix in (".bin", ".idx") if not os.path.isfile(f"{prefix}{suffix}")]
    if missing:
        hint = "prepare it, or correct the path"
        if os.path.splitext(prefix)[1] in SUFFIXES and os.path.isfile(prefix):
            hint = f"give the prefix without {os.path.splitext(prefix)[1]}"
        return [f"token file {prefix} does not exist (no {' and no '.join(missing)} at this prefix): {hint}"]
    try:
        problems = _check_index(str(prefix), os.path.getsize(f"{prefix}.bin"))
        if not problems:
            problems = _check_manifest(str(prefix), checksums=checksums)
    except OSError as error:
        return [f"token file {prefix} cannot be read ({error.strerror}): check its permissions"]
    return problems


def _check_index(prefix: str, bin_bytes: int) -> list[str]:
    damaged = f"index {prefix}.idx is damaged"
    idx_bytes = os.path.getsize(f"{prefix}.idx")
    with open(f"{prefix}.idx", "rb") as stream:
        head = stream.read(_HEADER.size)
        if len(head) < _HEADER.size:
            return [f"{damaged} (only {idx_bytes} bytes): {_PREPARE_AGAIN}"]
        magic, version, code, sequences, entries = _HEADER.unpack(head)
        if magic != _MAGIC or version != 1:
            return [f"{damaged} (it does not begin as an index of version 1): {_PREPARE_AGAIN}"]
        if code not in _ITEM_BYTES:
            return [f"{damaged} (number format {code} is none of token ids): {_PREPARE_AGAIN}"]
        plain = _HEADER.size + 12 * sequences + 8 * entries
        # Multimodal files have one more byte for each sequence.
        if idx_bytes not in (plain, plain + sequences):
            return [f"{damaged} ({idx_bytes} bytes where its header asks for {plain}): {_PREPARE_AGAIN}"]
        if sequences == 0 or entries < 2:
            return [f"token file {prefix} is empty (0 documents): prepare it from files that hold text"]
        length = _number(stream, "<i", _HEADER.size + 4 * (sequences - 1))
        pointer = _number(stream, "<q", _HEADER.size + 12 * sequences - 8)
        last_entry = _number(stream, "<q", plain - 8)
    if last_entry != sequences or length < 0 or pointer < 0:
        return [
            f"{damaged} (its last document ends at sequence {last_entry} of {sequences}): {_PREPARE_AGAIN}"
        ]
    needed = pointer + length * _ITEM_BYTES[code]
    if needed == 0:
        return [f"token file {prefix} is empty (0 tokens): prepare it from files that hold text"]
    if bin_bytes < needed:
        return [f"{prefix}.bin is truncated ({bin_bytes} bytes, its index needs {needed}): {_PREPARE_AGAIN}"]
    return []


def _check_manifest(prefix: str, *, checksums: bool) -> list[str]:
    try:
        manifest = read_manifest(prefix)
    except UserError as error:
        return [str(error)]
    if manifest is None:
        return []
    with open(f"{prefix}.idx", "rb") as stream:
        _, _, code, _, entries = _HEADER.unpack(stream.read(_HEADER.size))
    bin_bytes = os.path.getsize(f"{prefix}.bin")
    pairs: dict[str, tuple[int | str, int | str]] = {
        "bytes of .bin": (bin_bytes, manifest.bin_bytes),
        "documents": (entries - 1, manifest.documents),
        "tokens": (bin_bytes // _ITEM_BYTES[code], manifest.tokens),
    }
    if checksums:
        pairs["sha256 of .bin"] = (sha256_of(f"{prefix}.bin"), manifest.bin_sha256)
        pairs["sha256 of .idx"] = (sha256_of(f"{prefix}.idx"), manifest.idx_sha256)
    return [
        f"token file {prefix} disagrees with its manifest ({name}: {found}, not {stated}): {_PREPARE_AGAIN}"
        for name, (found, stated) in pairs.items()
        if found != stated
    ]


def sha256_of(path: str | Path) -> str:
    """Checksum of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _number(stream: BinaryIO, form: str, offset: int) -> int:
    stream.seek(offset)
    return int(struct.unpack(form, stream.read(struct.calcsize(form)))[0])
