"""Tokenizes one unit of a corpus: the work of a single process of a preparation.

A unit is some stretches of the corpus. Its tokens go to a file of its own, which appears under its
name when it is whole; the name is a digest of all that decides the content. So what is finished need
not be done again, after a crash or with one file mended, and nothing else is ever taken for it.
Imports no torch, because every worker process loads this module.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt

from megallama.corpus.corpus import (
    CorpusFile,
    Damage,
    Document,
    Reading,
    Stretch,
    cut_stretches,
    read_records,
)
from megallama.corpus.script import likely_language
from megallama.corpus.script_counts import count_characters
from megallama.host.errors import UserError
from megallama.host.files import replacing
from megallama.tokenizers.interface import SPACE_MARK, Tokenizer

UNIT_BYTES = 4 << 20
MAX_UNITS = 1 << 16
MAX_UNIT_BYTES = 1 << 28

_FOOTER = struct.Struct("<QQQ8s")  # documents, tokens, bytes of the summary
_MAGIC = b"MLUNIT03"
_DOCUMENT = np.dtype([("length", "<i8"), ("draw", "<f8"), ("stretch", "<i8"), ("place", "<i8")])
"""What stands behind the tokens of a unit for each of its documents."""
_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 1 << 20
_MAX_STRETCHES = 4096
_READ_TOKENS = 1 << 18
_READ_DOCUMENTS = 1 << 14


@dataclass(frozen=True)
class Unit:
    """Some stretches of one source."""

    stretches: tuple[Stretch, ...]
    key: str
    """Digest of the stretches, the state of their files, the tokenizer, the tokens round a document, the reading."""

    @property
    def num_bytes(self) -> int:
        """Bytes on the disk."""
        return sum(stretch.num_bytes for stretch in self.stretches)


@dataclass
class UnitSummary:
    """What is counted in a unit."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    """UTF-8 of the documents."""
    characters: dict[str, int] = field(default_factory=dict)
    """Characters of each script."""
    language_documents: dict[str, int] = field(default_factory=dict)
    """Documents of each likely language."""
    language_bytes: dict[str, int] = field(default_factory=dict)
    """Their UTF-8."""
    damaged: list[Damage] = field(default_factory=list)
    """Records that gave no document."""
    marked_documents: int = 0
    """Documents in which U+2581 stands, which this tokenizer takes for a space."""


def draw_of(key: str, *, seed: int) -> float:
    """Number in [0, 1) that depends on nothing but `key` and `seed`."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    # 53 bits, so that the quotient is exact and never rounds up to 1.
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def token_type(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """The number format of tokens: two bytes where the vocabulary fits, as megatron-core has it."""
    return np.uint16 if vocab_size < 65500 else np.int32


def plan_units(
    files: Sequence[CorpusFile],
    *,
    reading: Reading,
    seed: int,
    tokenizer: Tokenizer,
    begin_id: int | None,
    unit_bytes: int | None = None,
) -> Iterator[Unit]:
    """Units that cover `files` in order, each of about `unit_bytes`, of one source, and small files together.

    Raises:
        UserError: as `cut_stretches`.
    """
    if unit_bytes is None:
        unit_bytes = UNIT_BYTES
        total = sum(file.num_bytes for file in files)
        while total // unit_bytes > MAX_UNITS and unit_bytes < MAX_UNIT_BYTES:
            unit_bytes *= 2
    settings = repr((3, asdict(reading), seed, tokenizer.sha256, tokenizer.eod_id, begin_id))
    group: list[Stretch] = []
    size = 0
    for stretch in cut_stretches(files, reading=reading, stretch_bytes=unit_bytes):
        if group and (
            size >= unit_bytes or len(group) >= _MAX_STRETCHES or stretch.file.source != group[0].file.source
        ):
            yield _unit(group, settings)
            group, size = [], 0
        group.append(stretch)
        size += stretch.num_bytes
    if group:
        yield _unit(group, settings)


def unit_path(folder: Path, key: str) -> Path:
    """Where the unit `key` lies below `folder`."""
    return folder / key[:2] / key


def encode_unit(
    unit: Unit,
    path: Path,
    *,
    tokenizer: Tokenizer,
    begin_id: int | None,
    reading: Reading,
    seed: int,
    max_damaged: int,
) -> UnitSummary:
    """Tokenizes `unit` into the file `path`, which appears when it is whole; `begin_id` stands before each document.

    Memory is bounded by a batch of documents, however many there are.

    Raises:
        UserError: as `read_records`; more than `max_damaged` records give no document.
        OSError: `path` cannot be written.
    """
    summary = UnitSummary()
    scripts: Counter[str] = Counter()
    language_documents: Counter[str] = Counter()
    language_bytes: Counter[str] = Counter()
    dtype = token_type(tokenizer.vocab_size)
    begin = [] if begin_id is None else [begin_id]
    keeps_mark = tokenizer.decode(tokenizer.encode(SPACE_MARK)) == SPACE_MARK
    path.parent.mkdir(exist_ok=True)
    with (
        replacing(path, has_rivals=True) as stream,
        TemporaryFile(dir=path.parent, buffering=1 << 20) as table,
    ):
        for batch in _batches(unit, reading=reading, damaged=summary.damaged, max_damaged=max_damaged):
            texts = [document.text for _, document in batch]
            rows = np.empty(len(batch), dtype=_DOCUMENT)
            for index, ids in enumerate(_encode_batch(batch, unit, tokenizer)):
                ids = [*begin, *ids, tokenizer.eod_id]
                stream.write(np.array(ids, dtype=dtype).tobytes())
                number, document = batch[index]
                rows[index] = len(ids), draw_of(document.key, seed=seed), number, document.place
            table.write(rows.tobytes())
            summary.documents += len(batch)
            summary.tokens += int(rows["length"].sum())
            if not keeps_mark:
                summary.marked_documents += sum(SPACE_MARK in text for text in texts)
            for text in texts:
                characters = count_characters(text)
                scripts.update(characters)
                language = likely_language(characters)
                language_documents[language] += 1
                language_bytes[language] += len(text.encode("utf-8"))
        summary.characters = dict(sorted(scripts.items()))
        summary.language_documents = dict(sorted(language_documents.items()))
        summary.language_bytes = dict(sorted(language_bytes.items()))
        summary.text_bytes = sum(language_bytes.values())
        table.seek(0)
        shutil.copyfileobj(table, stream)
        content = json.dumps(asdict(summary)).encode()
        stream.write(content)
        stream.write(_FOOTER.pack(summary.documents, summary.tokens, len(content), _MAGIC))
    return summary


@dataclass(frozen=True)
class EncodedUnit:
    """Some documents of a finished unit, one after another."""

    tokens: npt.NDArray[np.integer]
    """All documents one after another, each with its begin token, where there is one, and its end token."""
    lengths: npt.NDArray[np.int64]
    """Tokens of each document."""
    draws: npt.NDArray[np.float64]
    """One number in [0, 1) for each document, a hash of the seed and the document's key."""
    stretches: npt.NDArray[np.int64]
    """Stretch of the unit that each document is from."""
    places: npt.NDArray[np.int64]
    """Its place in the file of that stretch, see `origins`."""


def read_summary(path: Path) -> UnitSummary | None:
    """The summary of the finished unit at `path`; None where there is none."""
    try:
        with open(path, "rb") as stream:
            stream.seek(-_FOOTER.size, os.SEEK_END)
            _, _, size, magic = _FOOTER.unpack(stream.read())
            if magic != _MAGIC:
                return None
            stream.seek(-_FOOTER.size - size, os.SEEK_END)
            content: dict[str, Any] = json.loads(stream.read(size))
    except (OSError, ValueError, struct.error):
        return None
    content["damaged"] = [Damage(**damage) for damage in content["damaged"]]
    return UnitSummary(**content)


def read_unit(path: Path, *, vocab_size: int) -> Iterator[EncodedUnit]:
    """The finished unit at `path`, some hundred thousand tokens at a time (or one document of more)."""
    dtype = np.dtype(token_type(vocab_size))
    with open(path, "rb") as stream:
        at = 0
        for table in _tables(path, dtype=dtype):
            ends = np.cumsum(table["length"])
            first, first_token = 0, 0
            while first < table.size:
                end = int(np.searchsorted(ends, first_token + _READ_TOKENS, side="right"))
                end = max(end, first + 1)
                count = int(ends[end - 1]) - first_token
                stream.seek(at * dtype.itemsize)
                tokens = np.fromfile(stream, dtype=dtype, count=count)
                part = table[first:end]
                yield EncodedUnit(
                    tokens=tokens,
                    lengths=part["length"],
                    draws=part["draw"],
                    stretches=part["stretch"],
                    places=part["place"],
                )
                at, first, first_token = at + count, end, first_token + count


def read_draws(path: Path, *, vocab_size: int) -> Iterator[npt.NDArray[np.float64]]:
    """Only the draws of the finished unit at `path`, part after part."""
    for table in _tables(path, dtype=np.dtype(token_type(vocab_size))):
        yield table["draw"]


def _tables(path: Path, *, dtype: np.dtype[Any]) -> Iterator[npt.NDArray[Any]]:
    """Rows of the table of documents, some ten thousand at a time."""
    with open(path, "rb") as stream:
        stream.seek(-_FOOTER.size, os.SEEK_END)
        documents, tokens, _, _ = _FOOTER.unpack(stream.read())
        for first in range(0, documents, _READ_DOCUMENTS):
            stream.seek(tokens * dtype.itemsize + first * _DOCUMENT.itemsize)
            yield np.fromfile(stream, dtype=_DOCUMENT, count=min(_READ_DOCUMENTS, documents - first))


def too_much_damage(damaged: Sequence[Damage], *, count: int, max_damaged: int) -> UserError:
    """The error for more records without a document than are allowed; `damaged` are those that are known."""
    if max_damaged == 0:
        return UserError(damaged[0].problem)
    return UserError(
        f"{count} damaged records, more than --max-damaged ({max_damaged}), the last one: {damaged[-1].problem};"
        " repair them, or raise --max-damaged to leave them out"
    )


def _encode_batch(batch: Sequence[tuple[int, Document]], unit: Unit, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each document; where the tokenizer fails, whatever it raises, its document is named."""
    try:
        return tokenizer.encode_batch([document.text for _, document in batch])
    except BaseException as error:
        if not _is_failure(error):
            raise
    for number, document in batch:
        try:
            tokenizer.encode(document.text)
        except BaseException as error:
            if not _is_failure(error):
                raise
            file = unit.stretches[number].file
            unit_of_place = "row" if file.is_parquet else "byte"
            place = f" (the one at {unit_of_place} {document.place})" if document.place >= 0 else ""
            raise UserError(
                f"file {file.path} has a document{place} that the tokenizer {tokenizer.path} cannot encode"
                f" ({str(error)[:200] or type(error).__name__}): shorten, mend or leave out that document"
            ) from error
    raise UserError(
        f"the tokenizer {tokenizer.path} fails on {len(batch)} documents together, from"
        f" {unit.stretches[batch[0][0]].file.path} on, but on none alone: run the same command again"
    )


def _is_failure(error: BaseException) -> bool:
    """Whether a tokenizer failed; what libraries in Rust raise for a fault of their own is no Exception."""
    panicked = type(error).__name__ == "PanicException"
    return panicked or (isinstance(error, Exception) and not isinstance(error, MemoryError))


def _unit(stretches: Sequence[Stretch], settings: str) -> Unit:
    digest = hashlib.blake2b(settings.encode("utf-8", "surrogateescape"), digest_size=16)
    for stretch in stretches:
        file = stretch.file
        state = (file.relative, file.path, file.num_bytes, file.modified_ns, file.is_text)
        digest.update(repr((*state, stretch.start, stretch.end)).encode("utf-8", "surrogateescape"))
    return Unit(stretches=tuple(stretches), key=digest.hexdigest())


def _batches(
    unit: Unit, *, reading: Reading, damaged: list[Damage], max_damaged: int
) -> Iterator[list[tuple[int, Document]]]:
    """Documents with the numbers of their stretches in the unit."""
    batch: list[tuple[int, Document]] = []
    size = 0
    for number, stretch in enumerate(unit.stretches):
        for record in read_records(stretch, reading=reading):
            if isinstance(record, Damage):
                damaged.append(record)
                if len(damaged) > max_damaged:
                    raise too_much_damage(damaged, count=len(damaged), max_damaged=max_damaged)
                continue
            batch.append((number, record))
            size += len(record.text)
            if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
