"""The files of a corpus: their kinds, and opening them.

Imports no torch: preparation workers load it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import BinaryIO

from megallama.host.errors import UserError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIX = ".parquet"
TEXT_SUFFIX = ".txt"
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
"""Endings that may follow `.txt`, those of JSON lines and the user's own."""


@dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus."""

    path: str
    """Where it is."""
    relative: str
    """Path below the input that named it, with `/`; it decides the split, so a moved corpus keeps it."""
    source: str
    """The input that named it, as it was given."""
    num_bytes: int
    """Size when the inputs were expanded."""
    modified_ns: int
    """Time of its last change then."""
    is_text: bool = False
    """The user named its ending as one of texts."""

    @property
    def is_jsonl(self) -> bool:
        """One JSON document a line."""
        return suffix_of(self.path) in JSON_SUFFIXES and not self.is_text

    @property
    def is_parquet(self) -> bool:
        """One document a row."""
        return suffix_of(self.path) == PARQUET_SUFFIX

    @property
    def compression(self) -> str:
        """One of `COMPRESSIONS`, or nothing."""
        return compression_of(self.path)


def suffix_of(path: str) -> str:
    """What is in a file, by its name: `.txt` for `a.TXT` and `a.txt.gz`."""
    return os.path.splitext(path.lower().removesuffix(compression_of(path)))[1]


def compression_of(path: str) -> str:
    """How a file is compressed, by its name: one of `COMPRESSIONS`, or nothing."""
    ending = os.path.splitext(path)[1].lower()
    return ending if ending in COMPRESSIONS else ""


def open_file(path: str) -> BinaryIO:
    """The bytes of a file as they lie on the disk.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return open(path, "rb")
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: str, error: OSError) -> UserError:
    """The error for a file that the system does not give."""
    return UserError(f"file {path} cannot be read ({error.strerror}): check its permissions and its disk")


def check_unchanged(file: CorpusFile) -> None:
    """That `file` is what it was when the inputs were expanded.

    Raises:
        UserError: it was written to, replaced or removed since.
    """
    try:
        state = os.stat(file.path)
    except OSError as error:
        raise UserError(
            f"file {file.path} disappeared while it was read ({error.strerror}): put it back and run the same"
            " command again"
        ) from error
    if (state.st_size, state.st_mtime_ns) != (file.num_bytes, file.modified_ns):
        raise UserError(
            f"file {file.path} changed while it was read ({file.num_bytes} bytes, then {state.st_size}):"
            " run the same command again when no other program writes to it"
        )
