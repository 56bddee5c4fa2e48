"""Manifests of token files and quick checks of the files, without torch or megatron-core.

A prepared dataset is `<prefix>.bin` (token ids), `<prefix>.idx` (megatron-core's index: magic, version,
dtype code, counts, then length and byte pointer of each sequence, then the first sequence of each
document) and, where megallama wrote it, `<prefix>.json`. One that was cut into shards is `<prefix>.json`
alone, which counts them, beside `<prefix>-00000.bin`, `.idx` and `.json`, `<prefix>-00001.bin` and so on.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import BinaryIO

from megallama.host.errors import UserError

MANIFEST_FORMAT = "megallama-tokens"
MANIFEST_VERSION = 1
SUFFIXES = (".bin", ".idx", ".json")
TRAIN, VALID = "train", "valid"
"""Names of the two parts of a prepared corpus."""
REPORT = "prepared.json"
"""The file that makes a folder one of `megallama prepare`."""

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, number format, sequences, document entries."""
# megatron-core 0.16.1, core/datasets/indexed_dataset.py, DType; floats cannot be token ids.
# megatron-core 0.16.1, core/datasets/indexed_dataset.py, DType; the other ones are refused.
NUMBER_FORMATS = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""NumPy's name of the integers that each code of an index means; the digit at the end is their width in bytes."""
_KINDS = {"int": (int,), "str": (str,), "int | None": (int, type(None))}
_PREPARE_AGAIN = "prepare or copy it again"


@dataclass(frozen=True)
class TokenManifest:
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
    """Of the file; of the one file that shards would make, so that the order of samples does not depend on them."""
    idx_sha256: str
    shards: int = 0
    """Number of token files that this manifest stands for; 0: the one beside it."""
    parts_sha256: str = ""
    """Of the shards' checksums; empty without shards, and in manifests of before there was this."""
    begin_id: int | None = None
    """The token that each document begins with; None: no token of its own, as before there was this."""


def shard_name(prefix: str | Path, number: int) -> str:
    """Prefix of shard `number`, counted from 0."""
    return f"{prefix}-{number:05}"


def shard_prefixes(prefix: str | Path) -> list[str]:
    """Prefixes of the token files that `prefix` stands for, in order: its shards, else `prefix` itself.

    Raises:
        UserError: there is a manifest that cannot be understood.
    """
    manifest = read_manifest(prefix)
    if manifest is None or manifest.shards == 0:
        return [str(prefix)]
    return [shard_name(prefix, number) for number in range(manifest.shards)]


def join_manifests(shards: Sequence[TokenManifest], *, bin_sha256: str, idx_sha256: str) -> TokenManifest:
    """The manifest of a dataset that is cut into `shards`; the checksums are those of the files without a cut."""
    parts = hashlib.sha256(" ".join(f"{shard.bin_sha256} {shard.idx_sha256}" for shard in shards).encode())
    return replace(
        shards[0],
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        bin_bytes=sum(shard.bin_bytes for shard in shards),
        bin_sha256=bin_sha256,
        idx_sha256=idx_sha256,
        shards=len(shards),
        parts_sha256=parts.hexdigest(),
    )


def content_identity(manifest: TokenManifest) -> str | None:
    """Digest of what the files of a manifest hold, whatever shards they are; None for shards of before it was known."""
    if manifest.shards and not manifest.parts_sha256:
        return None
    content = f"{manifest.bin_sha256} {manifest.idx_sha256}"
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def write_manifest(prefix: str | Path, manifest: TokenManifest) -> None:
    """Writes `<prefix>.json`."""
    content = {"format": MANIFEST_FORMAT, "version": MANIFEST_VERSION, **asdict(manifest)}
    with open(f"{prefix}.json", "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_manifest(prefix: str | Path) -> TokenManifest | None:
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
    kinds = {field.name: _KINDS[str(field.type)] for field in fields(TokenManifest)}
    # Manifests of before there were these.
    content = {"shards": 0, "parts_sha256": "", "begin_id": None, **content}
    wrong = [name for name, kind in kinds.items() if type(content.get(name)) not in kind]
    if wrong:
        raise UserError(
            f"manifest {path} lacks, or has an invalid value for, {', '.join(wrong)}: {_PREPARE_AGAIN}"
        )
    return TokenManifest(**{name: content[name] for name in kinds})


def check_token_file(prefix: str | Path) -> list[str]:
    """Problems of the token file at `prefix`; none: it can be opened.

    Reads a few hundred bytes, so it suits a login node; `checksums.compare_checksums` reads everything.
    """
    try:
        manifest = read_manifest(prefix)
    except UserError as error:
        return [str(error)]
    if manifest is not None and manifest.shards:
        return _check_shards(prefix, manifest)
    missing = [suffix for suffix in (".bin", ".idx") if not os.path.isfile(f"{prefix}{suffix}")]
    if missing:
        hint = "prepare it, or correct the path"
        if os.path.splitext(prefix)[1] in SUFFIXES and os.path.isfile(prefix):
            hint = f"give the prefix without {os.path.splitext(prefix)[1]}"
        pairs = (
            sorted(name for name in os.listdir(prefix) if name.endswith(".idx"))
            if os.path.isdir(prefix)
            else []
        )
        if pairs:
            hint = f"it is a folder, give the prefix of a pair in it, as {prefix}/{pairs[0].removesuffix('.idx')}"
        return [f"token file {prefix} does not exist (no {' and no '.join(missing)} at this prefix): {hint}"]
    try:
        problems = _check_index(str(prefix), os.path.getsize(f"{prefix}.bin"))
        if not problems:
            problems = _check_manifest(str(prefix), manifest)
    except OSError as error:
        return [f"token file {prefix} cannot be read ({error.strerror}): check its permissions"]
    return problems


def _item_bytes(code: int) -> int:
    return int(NUMBER_FORMATS[code][-1])


def _check_index(prefix: str, bin_bytes: int) -> list[str]:
    damaged = f"index {prefix}.idx is damaged"
    idx_bytes = os.path.getsize(f"{prefix}.idx")
    with open(f"{prefix}.idx", "rb") as stream:
        head = stream.read(INDEX_HEADER.size)
        if len(head) < INDEX_HEADER.size:
            return [f"{damaged} (only {idx_bytes} bytes): {_PREPARE_AGAIN}"]
        magic, version, code, sequences, entries = INDEX_HEADER.unpack(head)
        if magic != INDEX_MAGIC or version != 1:
            return [f"{damaged} (it does not begin as an index of version 1): {_PREPARE_AGAIN}"]
        if code not in NUMBER_FORMATS:
            return [f"{damaged} (number format {code} is none of token ids): {_PREPARE_AGAIN}"]
        plain = INDEX_HEADER.size + 12 * sequences + 8 * entries
        # Multimodal files have one more byte for each sequence.
        if idx_bytes not in (plain, plain + sequences):
            return [f"{damaged} ({idx_bytes} bytes where its header asks for {plain}): {_PREPARE_AGAIN}"]
        if sequences == 0 or entries < 2:
            return [f"token file {prefix} is empty (0 documents): prepare it from files that hold text"]
        length = _number(stream, "<i", INDEX_HEADER.size + 4 * (sequences - 1))
        pointer = _number(stream, "<q", INDEX_HEADER.size + 12 * sequences - 8)
        last_entry = _number(stream, "<q", plain - 8)
    if last_entry != sequences or length < 0 or pointer < 0:
        return [
            f"{damaged} (its last document ends at sequence {last_entry} of {sequences}): {_PREPARE_AGAIN}"
        ]
    needed = pointer + length * _item_bytes(code)
    if needed == 0:
        return [f"token file {prefix} is empty (0 tokens): prepare it from files that hold text"]
    if bin_bytes < needed:
        return [f"{prefix}.bin is truncated ({bin_bytes} bytes, its index needs {needed}): {_PREPARE_AGAIN}"]
    return []


def _check_shards(prefix: str | Path, whole: TokenManifest) -> list[str]:
    prefixes = [shard_name(prefix, number) for number in range(whole.shards)]
    problems = [problem for shard in prefixes for problem in check_token_file(shard)]
    if problems:
        return problems
    manifests = [read_manifest(shard) for shard in prefixes]
    found = [manifest for manifest in manifests if manifest is not None]
    if len(found) < len(prefixes):
        missing = prefixes[manifests.index(None)]
        return [f"shard {missing} has no manifest (no .json): {_PREPARE_AGAIN}"]
    if not _is_joined(found, whole):
        return [f"the {whole.shards} shards of {prefix} disagree with {prefix}.json: {_PREPARE_AGAIN}"]
    return []


def _is_joined(shards: Sequence[TokenManifest], whole: TokenManifest) -> bool:
    if whole.parts_sha256:
        return join_manifests(shards, bin_sha256=whole.bin_sha256, idx_sha256=whole.idx_sha256) == whole
    # Manifests of before `parts_sha256`: their own checksums were those of the shards' checksums.
    bins, indexes = (
        hashlib.sha256(" ".join(checksums).encode()).hexdigest()
        for checksums in zip(*((shard.bin_sha256, shard.idx_sha256) for shard in shards), strict=True)
    )
    joined = join_manifests(shards, bin_sha256=bins, idx_sha256=indexes)
    return replace(joined, parts_sha256="") == whole


def _check_manifest(prefix: str, manifest: TokenManifest | None) -> list[str]:
    if manifest is None:
        return []
    with open(f"{prefix}.idx", "rb") as stream:
        _, _, code, _, entries = INDEX_HEADER.unpack(stream.read(INDEX_HEADER.size))
    bin_bytes = os.path.getsize(f"{prefix}.bin")
    pairs: dict[str, tuple[int, int]] = {
        "bytes of .bin": (bin_bytes, manifest.bin_bytes),
        "documents": (entries - 1, manifest.documents),
        "tokens": (bin_bytes // _item_bytes(code), manifest.tokens),
    }
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
