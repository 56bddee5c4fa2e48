"""Parses bytes into documents: JSON lines, parts of a text, whole files; damaged records are reported with their place.

Imports no torch: preparation workers load it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

from megallama.corpus.files import CorpusFile, open_file
from megallama.host.errors import UserError

MAX_DOCUMENT_BYTES = 1 << 28
"""A document is tokenized in one piece, which takes some thirty times its size in memory."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    """One document."""

    text: str
    key: str
    """What the split hashes: the relative path, and the place where a file holds many documents."""
    place: int = -1
    """Byte or row at which it begins in a file that holds many; -1 in a file that is one document."""


@dataclass(frozen=True)
class Damage:
    """A record that gives no document."""

    file: str
    line: int
    """Line, or row of a Parquet file, from 1."""
    problem: str
    """One message with file, place and remedy."""


def read_json_lines(
    stream: IO[bytes], file: CorpusFile, *, start: int, end: int, text_field: str
) -> Iterator[Document | Damage]:
    """The texts of the lines that begin in [start, end); `stream` stands at `start`. Empty ones are left out."""
    for number, (offset, line) in enumerate(_lines(stream, file, start=start, end=end), start=1):
        if not line.strip():
            continue
        try:
            text = _text_of_line(line, path=file.path, offset=offset, text_field=text_field)
        except _BadLineError as error:
            line_number = _lines_before(file, start) + number
            yield Damage(
                file.path, line_number, error.problem.format(place=f"{file.path} line {line_number}")
            )
            continue
        if text:
            yield Document(text=text, key=f"{file.relative}:{offset}", place=offset)


def read_parts(
    stream: IO[bytes], file: CorpusFile, *, start: int, end: int, is_boundary: Callable[[bytes], bool]
) -> Iterator[Document | Damage]:
    """Parts of a text between boundary lines; the line end before a boundary belongs to the part."""
    lines: list[bytes] = []
    begin, begin_line, size = start, 1, 0
    for number, (offset, line) in enumerate(_lines(stream, file, start=start, end=end), start=1):
        if is_boundary(line):
            if size:
                yield _part(lines, file, start=start, offset=begin, number=begin_line)
            lines, size = [], 0
            continue
        if not lines:
            begin, begin_line = offset, number
        lines.append(line)
        size += len(line)
        _check_size(file, begin, size)
    if size:
        yield _part(lines, file, start=start, offset=begin, number=begin_line)


def read_whole(stream: IO[bytes], file: CorpusFile) -> Iterator[Document | Damage]:
    """The whole text as one document."""
    content = stream.read(MAX_DOCUMENT_BYTES + 1)
    _check_size(file, 0, len(content))
    offset = len(_BYTE_ORDER_MARK) if content.startswith(_BYTE_ORDER_MARK) else 0
    try:
        text = content[offset:].decode("utf-8")
    except UnicodeDecodeError as error:
        place = offset + error.start
        yield Damage(file.path, content.count(b"\n", 0, place) + 1, _not_utf8(file.path, error, offset))
        return
    if text:
        yield Document(text=text, key=file.relative)


def to_line_start(stream: IO[bytes]) -> None:
    """Moves `stream` behind the next line end, or to its end."""
    while (part := stream.readline(_BLOCK_BYTES)) and not part.endswith(b"\n"):
        pass


def to_boundary(stream: IO[bytes], is_boundary: Callable[[bytes], bool]) -> None:
    """Moves `stream` from anywhere behind the next line that is a boundary for certain, or to its end."""
    to_line_start(stream)
    is_start = True
    while line := stream.readline(_BLOCK_BYTES):
        if is_start and len(line) < _BLOCK_BYTES and is_boundary(line):
            return
        is_start = line.endswith(b"\n")


def surrogate_place(text: str) -> int | None:
    """Character that is half a surrogate pair, which no UTF-8 has."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


class _BadLineError(Exception):
    """A line that gives no document; `{place}` in the problem is filled in by who knows the line's number."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


def _lines(stream: IO[bytes], file: CorpusFile, *, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line with its end) of the lines that begin in [start, end); a byte order mark is dropped."""
    offset = start
    while offset < end:
        line = stream.readline(MAX_DOCUMENT_BYTES + 1)
        if not line:
            return
        _check_size(file, offset, len(line))
        size = len(line)
        if offset == 0 and line.startswith(_BYTE_ORDER_MARK):
            line, offset, size = (
                line[len(_BYTE_ORDER_MARK) :],
                len(_BYTE_ORDER_MARK),
                size - len(_BYTE_ORDER_MARK),
            )
        yield offset, line
        offset += size


def _check_size(file: CorpusFile, offset: int, size: int) -> None:
    if size > MAX_DOCUMENT_BYTES:
        raise UserError(
            f"file {file.path} has a document of more than {MAX_DOCUMENT_BYTES >> 20} MiB (from offset {offset}),"
            " which would not fit into memory: split it (--documents blank_line or --separator for text),"
            " or leave it out"
        )


def _part(lines: list[bytes], file: CorpusFile, *, start: int, offset: int, number: int) -> Document | Damage:
    try:
        text = b"".join(lines).decode("utf-8")
    except UnicodeDecodeError as error:
        line = _lines_before(file, start) + number + error.object.count(b"\n", 0, error.start)
        return Damage(file.path, line, _not_utf8(file.path, error, offset))
    return Document(text=text, key=f"{file.relative}:{offset}", place=offset)


def _not_utf8(path: str, error: UnicodeDecodeError, offset: int) -> str:
    byte = error.object[error.start]
    return (
        f"file {path} is not UTF-8 (byte 0x{byte:02x} at offset {offset + error.start}):"
        f" convert it (iconv -t UTF-8) or leave it out"
    )


def _text_of_line(line: bytes, *, path: str, offset: int, text_field: str) -> str:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadLineError(_escaped(_not_utf8(path, error, offset))) from error
    except json.JSONDecodeError as error:
        raise _BadLineError(
            f"{{place}} is not JSON ({_escaped(error.msg)} at column {error.colno}): put one JSON object on each line"
        ) from error
    except ValueError as error:  # a number of thousands of digits
        raise _BadLineError(f"{{place}} is not JSON ({_escaped(str(error))}): mend it") from error
    except RecursionError as error:
        raise _BadLineError("{place} is nested too deeply: mend it") from error
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        have = ", ".join(sorted(record)[:8]) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise _BadLineError(
            f"{{place}} has no text in field {_escaped(repr(text_field))} (it has {_escaped(have)}):"
            " mend the line, or name the field with --text-field"
        )
    half = surrogate_place(text)
    if half is not None:
        raise _BadLineError(f"{{place}} holds half a surrogate pair (character {half}): mend its \\u escapes")
    return text


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _lines_before(file: CorpusFile, offset: int) -> int:
    """Line ends before `offset`; counted only when there is something to report."""
    count = 0
    if offset:  # a compressed file is read from its start
        with open_file(file.path) as stream:
            while offset > 0 and (block := stream.read(min(offset, _BLOCK_BYTES))):
                count += block.count(b"\n")
                offset -= len(block)
    return count
