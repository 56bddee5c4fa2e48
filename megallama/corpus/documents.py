"""Parses bytes into documents: JSON lines, parts of a text, whole files; damaged records are reported with their place.

Imports no torch: preparation workers load it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from megallama.corpus.encoding import is_mostly_utf8, likely_encoding
from megallama.corpus.files import CorpusFile, open_file
from megallama.corpus.lines import BLOCK_BYTES, changed_places
from megallama.host.errors import UserError

MAX_DOCUMENT_BYTES = 1 << 28
"""A document is tokenized in one piece, which takes some thirty times its size in memory."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SHOWN_FIELDS = 8


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
    stream: IO[bytes], file: CorpusFile, *, start: int, end: int, text_field: str, has_cr: bool
) -> Iterator[Document | Damage]:
    """The texts of the lines that begin in [start, end); `stream` stands at `start`. Empty ones are left out.

    With `has_cr` the lines end with CR, and CR and LF have changed places in `stream`.
    """
    for number, (offset, line) in enumerate(_lines(stream, file, start=start, end=end), start=1):
        if not line.strip():
            continue
        try:
            text = _text_of_line(line, path=file.path, offset=offset, text_field=text_field)
        except _BadLineError as error:
            line_number = _lines_before(file, start, has_cr=has_cr) + number
            yield Damage(
                file.path, line_number, error.problem.format(place=f"{file.path} line {line_number}")
            )
            continue
        if text:
            yield Document(text=text, key=f"{file.relative}:{offset}", place=offset)


def read_parts(
    stream: IO[bytes],
    file: CorpusFile,
    *,
    start: int,
    end: int,
    is_boundary: Callable[[bytes], bool],
    has_cr: bool,
) -> Iterator[Document | Damage]:
    """Parts of a text between boundary lines; the line end before a boundary belongs to the part.

    `has_cr` as for `read_json_lines`.
    """
    lines: list[bytes] = []
    begin, begin_line, size = start, 1, 0
    for number, (offset, line) in enumerate(_lines(stream, file, start=start, end=end), start=1):
        if is_boundary(line):
            if size:
                yield _part(lines, file, start=start, offset=begin, number=begin_line, has_cr=has_cr)
            lines, size = [], 0
            continue
        if not lines:
            begin, begin_line = offset, number
        lines.append(line)
        size += len(line)
        _check_size(file, begin, size)
    if size:
        yield _part(lines, file, start=start, offset=begin, number=begin_line, has_cr=has_cr)


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


def _part(
    lines: list[bytes], file: CorpusFile, *, start: int, offset: int, number: int, has_cr: bool
) -> Document | Damage:
    content = b"".join(lines)
    try:
        text = (changed_places(content) if has_cr else content).decode("utf-8")
    except UnicodeDecodeError as error:
        line = _lines_before(file, start, has_cr=has_cr) + number + content.count(b"\n", 0, error.start)
        return Damage(file.path, line, _not_utf8(file.path, error, offset))
    return Document(text=text, key=f"{file.relative}:{offset}", place=offset)


def _not_utf8(path: str, error: UnicodeDecodeError, offset: int) -> str:
    content, at = error.object, error.start
    place = f"file {path} is not UTF-8 (byte 0x{content[at]:02x} at offset {offset + at})"
    encoding = likely_encoding(content, at)
    if encoding is not None:
        convert = f"iconv -f {encoding} -t UTF-8 FILE > NEW"
        return f"{place}, it looks like {encoding}: convert it ({convert}), or leave it out"
    if is_mostly_utf8(content, at):
        return f"{place}, but the text around it is: mend that place, or leave it out"
    return (
        f"{place}: find out its encoding, convert it (iconv -f ENCODING -t UTF-8 FILE > NEW), or leave it out"
    )


def _text_of_line(line: bytes, *, path: str, offset: int, text_field: str) -> str:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadLineError(_escaped(_not_utf8(path, error, offset))) from error
    except json.JSONDecodeError as error:
        how = " (jq -c '.[]' FILE > NEW)" if line.startswith(b"[") else ""
        raise _BadLineError(
            f"{{place}} is not JSON ({_escaped(error.msg)} at column {error.colno}):"
            f" put one JSON object on each line{how}"
        ) from error
    except ValueError as error:  # a number of thousands of digits
        raise _BadLineError(f"{{place}} is not JSON ({_escaped(str(error))}): mend it") from error
    except RecursionError as error:
        raise _BadLineError("{place} is nested too deeply: mend it") from error
    text = _field(record, text_field)
    if not isinstance(text, str):
        raise _BadLineError("{place} " + _escaped(_no_text(record, text_field)))
    half = surrogate_place(text)
    if half is not None:
        raise _BadLineError(f"{{place}} holds half a surrogate pair (character {half}): mend its \\u escapes")
    return text


def has_field(record: Any, text_field: str) -> bool:
    """Whether a JSON record has text in `text_field`, which may be one of an object inside (`data.text`)."""
    return isinstance(_field(record, text_field), str)


def _field(record: Any, text_field: str) -> Any:
    """What `text_field` is in a JSON record: a field of that very name, else the one along its dots; None: nothing."""
    if isinstance(record, dict) and text_field in record:
        return record[text_field]
    value = record
    for name in text_field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _no_text(record: Any, text_field: str) -> str:
    """Why `record` has no text in that field, and what to do."""
    problem = f"has no text in field {text_field!r}"
    if isinstance(record, list):
        return f"{problem} (it has a list): put one JSON object on each line (jq -c '.[]' FILE > NEW)"
    if not isinstance(record, dict):
        return f"{problem} (it has {_kind(record)}): put one JSON object on each line"
    value = _field(record, text_field)
    if isinstance(value, dict):
        inside = [name for name in _text_fields(value, f"{text_field}.")] or ["none of text"]
        return (
            f"{problem} (that is an object with {', '.join(inside[:_SHOWN_FIELDS])}): name the field inside it with"
            " --text-field"
        )
    if value is not None or text_field in record:
        return f"{problem} (that is {_kind(value)}): mend the line, or name another field with --text-field"
    have = [*_text_fields(record), *sorted(n for n, v in record.items() if not isinstance(v, str | dict))]
    shown = ", ".join(have[:_SHOWN_FIELDS]) or "none"
    return f"{problem} (it has {shown}): mend the line, or name the field with --text-field"


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return names.get(type(value), "a number")


def _text_fields(record: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Names of the fields that hold text, as `--text-field` takes them."""
    for name, value in sorted(record.items()):
        if isinstance(value, str):
            yield prefix + name
        elif isinstance(value, dict):
            yield from _text_fields(value, f"{prefix}{name}.")


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _lines_before(file: CorpusFile, offset: int, *, has_cr: bool) -> int:
    """Line ends before `offset`; counted only when there is something to report."""
    count = 0
    if offset:  # a compressed file is read from its start
        with open_file(file.path) as stream:
            while offset > 0 and (block := stream.read(min(offset, BLOCK_BYTES))):
                count += block.count(b"\r" if has_cr else b"\n")
                offset -= len(block)
    return count
