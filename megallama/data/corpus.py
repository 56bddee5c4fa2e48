"""Raw text: which files belong to a corpus, and the documents in them.

A corpus file is cut into stretches, byte ranges that hold whole documents and can be read on their
own, so that many processes can share one file. Imports no torch: preparation workers load it.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, get_args

from megallama.host.errors import UserError

Documents = Literal["file", "blank_line"]
"""What one document of a text file is: the whole file, or each part between blank lines."""

JSONL_SUFFIX = ".jsonl"
TEXT_SUFFIX = ".txt"
STRETCH_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus."""

    path: str
    """Where it is."""
    relative: str
    """Path below the input that named it, with `/`; it decides the split, so a moved corpus keeps it."""
    num_bytes: int
    """Size when the inputs were expanded."""

    @property
    def is_jsonl(self) -> bool:
        """One JSON document a line; else plain text."""
        return self.path.lower().endswith(JSONL_SUFFIX)


@dataclass(frozen=True)
class Reading:
    """How documents are read out of files."""

    documents: Documents = "file"
    text_field: str = "text"

    def __post_init__(self) -> None:
        if self.documents not in get_args(Documents):
            raise UserError(
                f"documents ({self.documents!r}) is unknown: use one of {', '.join(get_args(Documents))}"
            )

    def is_whole(self, file: CorpusFile) -> bool:
        """Whether `file` is one document."""
        return not file.is_jsonl and self.documents == "file"


@dataclass(frozen=True)
class Stretch:
    """Bytes [start, end) of a file: whole documents."""

    file: CorpusFile
    start: int
    end: int


@dataclass(frozen=True)
class Document:
    """One document."""

    text: str
    key: str
    """What the split hashes: the relative path, and the byte offset where a file holds many documents."""


def expand_inputs(inputs: Sequence[str | Path], *, suffixes: Sequence[str] = ()) -> list[CorpusFile]:
    """The corpus files that `inputs` (files, globs, folders) name, in their order, each once.

    Folders and globs give the `.txt` and `.jsonl` files and those of the extra `suffixes` (read as
    text) below them, sorted by relative path; names that begin with a dot are passed over.

    Raises:
        UserError: an input that does not exist, is no regular file, cannot be read, has another
            suffix, or matches nothing.
    """
    if not inputs:
        raise UserError("no input (0 given): name text files, folders or globs")
    wanted = {TEXT_SUFFIX, JSONL_SUFFIX} | {"." + suffix.lower().lstrip(".") for suffix in suffixes}
    found: list[CorpusFile] = []
    for item in inputs:
        found.extend(_expand(str(item), wanted))
    once: dict[str, CorpusFile] = {}
    for file in found:
        once.setdefault(os.path.realpath(file.path), file)
    return list(once.values())


def cut_stretches(
    files: Sequence[CorpusFile], *, reading: Reading, stretch_bytes: int = STRETCH_BYTES
) -> Iterator[Stretch]:
    """Stretches of about `stretch_bytes` that cover `files` in order; a whole-file document is one."""
    for file in files:
        start = 0
        if not reading.is_whole(file):
            with _open(file.path) as stream:
                while start + stretch_bytes < file.num_bytes:
                    stream.seek(start + stretch_bytes)
                    _to_document_start(stream, is_jsonl=file.is_jsonl)
                    end = min(stream.tell(), file.num_bytes)
                    yield Stretch(file, start, end)
                    start = end
        if start < file.num_bytes:
            yield Stretch(file, start, file.num_bytes)


def read_documents(stretch: Stretch, *, reading: Reading) -> Iterator[Document]:
    """The documents of a stretch; empty ones are left out.

    Text is passed on exactly as it stands, line ends included; only a byte order mark is dropped.

    Raises:
        UserError: not UTF-8 (with the byte offset), broken JSON or missing field (with the line).
    """
    file = stretch.file
    with _open(file.path) as stream:
        stream.seek(stretch.start)
        if stretch.start == 0 and stream.read(len(_BYTE_ORDER_MARK)) != _BYTE_ORDER_MARK:
            stream.seek(0)
        if file.is_jsonl:
            yield from _read_jsonl(stream, stretch, reading.text_field)
        elif reading.documents == "blank_line":
            yield from _read_parts(stream, stretch)
        else:
            offset = stream.tell()
            text = _decode(stream.read(stretch.end - offset), file.path, offset)
            if text:
                yield Document(text=text, key=file.relative)


def stream_documents(files: Sequence[CorpusFile], *, reading: Reading) -> Iterator[Document]:
    """All documents of `files` in order.

    Raises:
        UserError: as `read_documents`.
    """
    for stretch in cut_stretches(files, reading=reading):
        yield from read_documents(stretch, reading=reading)


def empty_corpus(files: Sequence[CorpusFile]) -> UserError:
    """The error for inputs without any text."""
    return UserError(f"the corpus is empty ({len(files)} files without any text): give files that hold text")


def _expand(item: str, wanted: set[str]) -> list[CorpusFile]:
    if os.path.isdir(item):
        found = [_corpus_file(path, root=item) for path in _walk(item) if _suffix(path) in wanted]
    elif os.path.exists(item):
        if _suffix(item) not in wanted:
            raise UserError(
                f"input {item} has the suffix {_suffix(item)!r}, not one of {', '.join(sorted(wanted))}:"
                " add it to the suffixes to read it as text"
            )
        found = [_corpus_file(item, root=os.path.dirname(item))]
    elif glob.has_magic(item):
        root = _fixed_part(item)
        paths: list[str] = []
        for match in sorted(glob.glob(item, recursive=True)):
            paths.extend(_walk(match) if os.path.isdir(match) else [match])
        found = [_corpus_file(path, root=root) for path in paths if _suffix(path) in wanted]
    else:
        raise UserError(f"input {item} does not exist: give a file, a folder or a glob that matches")
    if not found:
        raise UserError(
            f"input {item} matches no file with suffix {', '.join(sorted(wanted))}: change it or the suffixes"
        )
    return sorted(found, key=lambda file: file.relative)


def _walk(folder: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise UserError(f"folder {error.filename} cannot be read ({error.strerror}): change its permissions")

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in sorted(names) if not name.startswith("."))


def _fixed_part(pattern: str) -> str:
    parts = Path(pattern).parts
    count = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return str(Path(*parts[:count]))


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _corpus_file(path: str, *, root: str) -> CorpusFile:
    if not os.path.isfile(path):
        raise UserError(f"input {path} is not a regular file: give files that can be read twice")
    with _open(path) as stream:
        num_bytes = stream.seek(0, os.SEEK_END)
    relative = os.path.relpath(path, root or ".").replace(os.sep, "/")
    return CorpusFile(path=path, relative=relative, num_bytes=num_bytes)


def _open(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"file {path} cannot be read ({error.strerror}): check its permissions") from error


def _to_document_start(stream: BinaryIO, *, is_jsonl: bool) -> None:
    """Moves `stream` from anywhere to the next place where a document may begin, or to the end."""
    line = stream.readline()  # the rest of a line that began before
    if is_jsonl:
        return
    while line:
        line = stream.readline()
        if not line.strip():
            return


def _decode(content: bytes, path: str, offset: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        place = offset + error.start
        raise UserError(
            f"file {path} is not UTF-8 (byte 0x{content[error.start]:02x} at offset {place}):"
            f" convert it (iconv -t UTF-8) or leave it out"
        ) from error


def _read_jsonl(stream: BinaryIO, stretch: Stretch, text_field: str) -> Iterator[Document]:
    path = stretch.file.path
    offset = stream.tell()
    while offset < stretch.end:
        line = stream.readline()
        if line.strip():
            text = _text_of_line(line, path=path, offset=offset, text_field=text_field)
            if text:
                yield Document(text=text, key=f"{stretch.file.relative}:{offset}")
        offset += len(line)
        if not line:
            return


def _text_of_line(line: bytes, *, path: str, offset: int, text_field: str) -> str:
    try:
        record = json.loads(_decode(line, path, offset))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} line {_line_number(path, offset)} is not JSON ({error.msg} at column {error.colno}):"
            " put one JSON object on each line"
        ) from error
    except RecursionError as error:
        raise UserError(f"{path} line {_line_number(path, offset)} is nested too deeply: mend it") from error
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        have = ", ".join(sorted(record)[:8]) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise UserError(
            f"{path} line {_line_number(path, offset)} has no text in field {text_field!r} (it has {have}):"
            " mend the line or set text_field"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{path} line {_line_number(path, offset)} holds half a surrogate pair (character {error.start}):"
            " mend its \\u escapes"
        ) from error
    return text


def _line_number(path: str, offset: int) -> int:
    """Number (from 1) of the line at `offset`; counted only when there is something to report."""
    count = 1
    with _open(path) as stream:
        while offset > 0:
            block = stream.read(min(offset, STRETCH_BYTES))
            count += block.count(b"\n")
            offset -= len(block)
    return count


def _read_parts(stream: BinaryIO, stretch: Stretch) -> Iterator[Document]:
    """Parts of a text between blank lines; the line end before a blank line belongs to the part."""
    path, lines = stretch.file.path, list[bytes]()
    offset = begin = stream.tell()
    while offset < stretch.end:
        line = stream.readline()
        if line.strip():
            if not lines:
                begin = offset
            lines.append(line)
        offset += len(line)
        if lines and (not line.strip() or offset >= stretch.end):
            text = _decode(b"".join(lines), path, begin)
            yield Document(text=text, key=f"{stretch.file.relative}:{begin}")
            lines = []
        if not line:
            return
