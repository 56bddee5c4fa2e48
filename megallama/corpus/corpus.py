"""The documents of a corpus, and its division into parts that processes can read independently.

A corpus is cut into stretches, parts of a file that hold whole documents and can be read on their
own, so that many processes can share one file: byte ranges of text and JSON lines, row groups of
Parquet; a compressed file is one stretch. Imports no torch: preparation workers load it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from megallama.corpus.decompression import open_content
from megallama.corpus.documents import (
    Damage,
    Document,
    read_json_lines,
    read_parts,
    read_whole,
)
from megallama.corpus.files import CorpusFile, check_unchanged, open_file
from megallama.corpus.inputs import expand_inputs
from megallama.corpus.lines import ends_with_cr, is_blank, to_boundary, to_line_start, with_changed_places
from megallama.corpus.parquet import cut_row_groups, read_rows
from megallama.host.errors import UserError

__all__ = [
    "CorpusFile",
    "Damage",
    "Document",
    "Documents",
    "Reading",
    "Stretch",
    "cut_stretches",
    "empty_corpus",
    "expand_inputs",
    "read_documents",
    "read_records",
    "stream_documents",
]

Documents = Literal["file", "blank_line", "separator"]
"""What one document of a text file is: the whole file, or each part between blank lines or separator lines."""

STRETCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Reading:
    """How documents are read out of files."""

    documents: Documents = "file"
    text_field: str = "text"
    separator: str = ""
    """The line between two documents, with documents=separator; without its line end."""

    def __post_init__(self) -> None:
        if self.documents not in get_args(Documents):
            raise UserError(
                f"documents ({self.documents!r}) is unknown: use one of {', '.join(get_args(Documents))}"
            )
        if (self.documents == "separator") != bool(self.separator):
            raise UserError(
                f"documents ({self.documents}) and separator ({self.separator!r}) go together:"
                " give documents=separator and the line that separates documents, or neither"
            )
        if "\n" in self.separator or "\r" in self.separator:
            raise UserError(f"separator ({self.separator!r}) must be one line: give it without line ends")

    def is_whole(self, file: CorpusFile) -> bool:
        """Whether `file` is one document."""
        return not (file.is_jsonl or file.is_parquet) and self.documents == "file"

    @property
    def is_boundary(self) -> Callable[[bytes], bool]:
        """Whether a line of a text lies between two documents."""
        if self.documents == "blank_line":
            return is_blank
        separator = self.separator.encode()
        return lambda line: line.rstrip(b"\r\n") == separator


@dataclass(frozen=True)
class Stretch:
    """Bytes, or of Parquet row groups, [start, end) of a file: whole documents."""

    file: CorpusFile
    start: int
    end: int
    num_bytes: int
    """Bytes on the disk, for progress."""


def cut_stretches(
    files: Sequence[CorpusFile], *, reading: Reading, stretch_bytes: int = STRETCH_BYTES
) -> Iterator[Stretch]:
    """Stretches of about `stretch_bytes` that cover `files` in order; what cannot be cut is one.

    Raises:
        UserError: a file that cannot be read, or is no Parquet.
    """
    for file in files:
        if file.num_bytes == 0:
            continue
        if file.is_parquet and not file.compression:
            for first, end, size in cut_row_groups(file, stretch_bytes=stretch_bytes):
                yield Stretch(file, first, end, size)
        elif file.compression or reading.is_whole(file):
            yield Stretch(file, 0, file.num_bytes, file.num_bytes)
        else:
            for start, end in _cut_lines(file, reading=reading, stretch_bytes=stretch_bytes):
                yield Stretch(file, start, end, end - start)


def read_records(stretch: Stretch, *, reading: Reading) -> Iterator[Document | Damage]:
    """The documents of a stretch, without empty ones, and the records that give none.

    Text is passed on exactly as it stands, line ends included; only a byte order mark is dropped.

    Raises:
        UserError: the file cannot be read, is damaged as a whole, or changed since it was listed.
    """
    file = stretch.file
    if file.is_parquet and file.compression:
        raise UserError(
            f"file {file.path} is compressed Parquet, which cannot be read in parts: decompress it"
            " (Parquet compresses inside)"
        )
    for record in _read_records(stretch, reading=reading):
        if isinstance(record, Damage):
            check_unchanged(file)  # half of a new content looks damaged
        yield record


def read_documents(stretch: Stretch, *, reading: Reading) -> Iterator[Document]:
    """As `read_records`, but a record that gives no document is an error.

    Raises:
        UserError: as `read_records`, or not UTF-8, broken JSON or missing field, with file and place.
    """
    for record in read_records(stretch, reading=reading):
        if isinstance(record, Damage):
            raise UserError(record.problem)
        yield record


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


def _cut_lines(file: CorpusFile, *, reading: Reading, stretch_bytes: int) -> Iterator[tuple[int, int]]:
    start = 0
    with open_file(file.path) as content:
        stream = with_changed_places(content) if ends_with_cr(file) else content
        while start + stretch_bytes < file.num_bytes:
            stream.seek(start + stretch_bytes)
            if file.is_jsonl:
                to_line_start(stream)
            else:
                to_boundary(stream, reading.is_boundary)
            end = min(stream.tell(), file.num_bytes)
            yield start, end
            start = end
    if start < file.num_bytes:
        yield start, file.num_bytes


def _read_records(stretch: Stretch, *, reading: Reading) -> Iterator[Document | Damage]:
    file = stretch.file
    with open_content(file) as stream:
        if file.is_parquet:
            yield from read_rows(
                stream, file, first=stretch.start, end=stretch.end, text_field=reading.text_field
            )
            return
        if reading.is_whole(file):
            yield from read_whole(stream, file)
            return
        has_cr = ends_with_cr(file)
        if stretch.start:
            stream.seek(stretch.start)
        lines = with_changed_places(stream) if has_cr else stream
        start, end = stretch.start, sys.maxsize if file.compression else stretch.end
        if file.is_jsonl:
            yield from read_json_lines(
                lines, file, start=start, end=end, text_field=reading.text_field, has_cr=has_cr
            )
        else:
            yield from read_parts(
                lines, file, start=start, end=end, is_boundary=reading.is_boundary, has_cr=has_cr
            )
