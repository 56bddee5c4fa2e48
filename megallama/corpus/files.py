"""The files of a corpus: which ones the given paths mean, their kinds, and opening them.

Imports no torch: preparation workers load it.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megallama.host.errors import UserError

JSONL_SUFFIX = ".jsonl"
PARQUET_SUFFIX = ".parquet"
TEXT_SUFFIX = ".txt"
COMPRESSIONS = (".gz", ".zst")
"""Endings that may follow `.txt`, `.jsonl` and the user's own."""


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

    @property
    def is_jsonl(self) -> bool:
        """One JSON document a line."""
        return suffix_of(self.path) == JSONL_SUFFIX

    @property
    def is_parquet(self) -> bool:
        """One document a row."""
        return suffix_of(self.path) == PARQUET_SUFFIX

    @property
    def compression(self) -> str:
        """`.gz`, `.zst` or nothing."""
        return compression_of(self.path)


def suffix_of(path: str) -> str:
    """What is in a file, by its name: `.txt` for `a.TXT` and `a.txt.gz`."""
    return os.path.splitext(path.lower().removesuffix(compression_of(path)))[1]


def compression_of(path: str) -> str:
    """How a file is compressed, by its name: one of `COMPRESSIONS`, or nothing."""
    ending = os.path.splitext(path)[1].lower()
    return ending if ending in COMPRESSIONS else ""


def expand_inputs(inputs: Sequence[str | Path], *, suffixes: Sequence[str] = ()) -> list[CorpusFile]:
    """The corpus files that `inputs` (files, globs, folders) name, in their order, each once.

    Folders and globs give the `.txt`, `.jsonl` and `.parquet` files and those of the extra `suffixes`
    (read as text) below them, `.gz` and `.zst` of them included, sorted by relative path; names that
    begin with a dot are passed over.

    Raises:
        UserError: an input that does not exist, is no regular file, cannot be read, has another
            suffix, or matches nothing.
    """
    if not inputs:
        raise UserError("no input (0 given): name text files, folders or globs")
    wanted = {TEXT_SUFFIX, JSONL_SUFFIX, PARQUET_SUFFIX}
    wanted |= {"." + suffix.lower().lstrip(".") for suffix in suffixes}
    found: list[CorpusFile] = []
    for item in inputs:
        found.extend(_expand(str(item), wanted))
    once: dict[str, CorpusFile] = {}
    for file in found:
        once.setdefault(os.path.realpath(file.path), file)
    return list(once.values())


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


def _expand(item: str, wanted: set[str]) -> list[CorpusFile]:
    if os.path.isdir(item):
        found = [
            _corpus_file(path, root=item, source=item) for path in _walk(item) if suffix_of(path) in wanted
        ]
    elif os.path.exists(item):
        if suffix_of(item) not in wanted:
            raise UserError(
                f"input {item} has the suffix {suffix_of(item)!r}, not one of {', '.join(sorted(wanted))}:"
                " add it to the suffixes to read it as text"
            )
        found = [_corpus_file(item, root=os.path.dirname(item), source=item)]
    elif glob.has_magic(item):
        root = _fixed_part(item)
        paths: list[str] = []
        for match in sorted(glob.glob(item, recursive=True)):
            paths.extend(_walk(match) if os.path.isdir(match) else [match])
        found = [_corpus_file(path, root=root, source=item) for path in paths if suffix_of(path) in wanted]
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


def _corpus_file(path: str, *, root: str, source: str) -> CorpusFile:
    if not os.path.isfile(path):
        raise UserError(f"input {path} is not a regular file: give files that can be read twice")
    with open_file(path) as stream:
        state = os.fstat(stream.fileno())
    relative = os.path.relpath(path, root or ".").replace(os.sep, "/")
    return CorpusFile(
        path=path,
        relative=relative,
        source=source,
        num_bytes=state.st_size,
        modified_ns=state.st_mtime_ns,
    )
