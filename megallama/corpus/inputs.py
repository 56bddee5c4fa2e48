"""Which files of a corpus the given paths mean, and how many are passed over, for which reason."""

from __future__ import annotations

import glob
import json
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from megallama.corpus.decompression import open_content
from megallama.corpus.documents import has_field
from megallama.corpus.files import (
    JSON_SUFFIXES,
    PARQUET_SUFFIX,
    TEXT_SUFFIX,
    CorpusFile,
    open_file,
    suffix_of,
)
from megallama.host.errors import UserError

_ALWAYS = (TEXT_SUFFIX, JSON_SUFFIXES[0], PARQUET_SUFFIX)
"""Endings whose kind is certain, whatever the user says of them."""
_PROBE_BYTES = 1 << 20
_HIDDEN = "names that begin with a dot"
_TWICE = "given or linked more than once"


def expand_inputs(
    inputs: Sequence[str | Path],
    *,
    suffixes: Sequence[str] = (),
    text_field: str = "text",
    passed_over: Counter[str] | None = None,
) -> list[CorpusFile]:
    """The corpus files that `inputs` (files, globs, folders) name, in their order, each once.

    Folders and globs give the files of text, JSON lines and Parquet and those of the extra `suffixes` (read as text)
    below them, compressed ones included, sorted by relative path. Links to folders are followed, each folder once.
    Names that begin with a dot are passed over, and `.json` files that do not hold JSON lines, such as settings.

    Args:
        inputs: Files, globs, folders.
        suffixes: Further endings to take.
        text_field: By which a `.json` file of one line is known to be a document.
        passed_over: Is told how many files below the inputs are not among those returned, by reason.

    Raises:
        UserError: an input that does not exist, is no regular file, cannot be read, has another
            suffix, or matches nothing.
    """
    if not inputs:
        raise UserError("no input (0 given): name text files, folders or globs")
    passed: Counter[str] = Counter()
    extra = frozenset("." + suffix.lower().lstrip(".") for suffix in suffixes)
    found: list[CorpusFile] = []
    for item in inputs:
        found.extend(_expand(str(item), extra, text_field=text_field, passed=passed))
    once: dict[str, CorpusFile] = {}
    for file in found:
        once.setdefault(os.path.realpath(file.path), file)
    passed[_TWICE] += len(found) - len(once)
    if passed_over is not None:
        passed_over += passed
    return list(once.values())


def describe_passed_over(passed_over: Counter[str]) -> str:
    """The counts as one line."""
    return ", ".join(f"{count:,} {reason}" for reason, count in (+passed_over).most_common())


def _expand(item: str, extra: frozenset[str], *, text_field: str, passed: Counter[str]) -> list[CorpusFile]:
    wanted = extra.union(_ALWAYS, JSON_SUFFIXES)
    if os.path.isdir(item):
        found = list(_chosen(_walk(item, passed), item, item, extra, text_field=text_field, passed=passed))
    elif os.path.exists(item):
        if suffix_of(item) not in wanted:
            raise UserError(
                f"input {item} has the suffix {suffix_of(item)!r}, not one of {', '.join(sorted(wanted))}:"
                " add it to the suffixes to read it as text"
            )
        found = [_corpus_file(item, root=os.path.dirname(item), source=item, extra=extra)]
    elif glob.has_magic(item):
        paths: list[str] = []
        for match in sorted(glob.glob(item, recursive=True)):
            paths.extend(_walk(match, passed) if os.path.isdir(match) else [match])
        root = _fixed_part(item)
        found = list(_chosen(paths, root, item, extra, text_field=text_field, passed=passed))
    else:
        raise UserError(f"input {item} does not exist: give a file, a folder or a glob that matches")
    if not found:
        others = f" ({describe_passed_over(passed)})" if +passed else ""
        raise UserError(
            f"input {item} matches no file with suffix {', '.join(sorted(wanted))}{others}:"
            " change it or the suffixes"
        )
    return sorted(found, key=lambda file: file.relative)


def _chosen(
    paths: Iterator[str] | Sequence[str],
    root: str,
    source: str,
    extra: frozenset[str],
    *,
    text_field: str,
    passed: Counter[str],
) -> Iterator[CorpusFile]:
    """Those of `paths` that are read."""
    for path in paths:
        suffix = suffix_of(path)
        if suffix not in extra.union(_ALWAYS, JSON_SUFFIXES):
            passed[f"ending {os.path.splitext(path)[1].lower()}" if suffix else "without an ending"] += 1
            continue
        file = _corpus_file(path, root=root, source=source, extra=extra)
        if suffix == ".json" and file.is_jsonl and not _holds_json_lines(file, text_field):
            passed[".json without JSON lines"] += 1
            continue
        yield file


def _walk(folder: str, passed: Counter[str]) -> Iterator[str]:
    """Files below `folder`, those behind links to folders last, so that a file goes by its own path first."""

    def refuse(error: OSError) -> None:
        raise UserError(f"folder {error.filename} cannot be read ({error.strerror}): change its permissions")

    seen: set[tuple[int, int]] = set()
    tops = deque([folder])
    while tops:
        top = tops.popleft()
        if _identity(top) in seen:
            passed[f"links to folders {_TWICE}"] += 1
            continue
        for parent, folders, names in os.walk(top, onerror=refuse):
            seen.add(_identity(parent))
            shown = sorted(name for name in folders if not name.startswith("."))
            passed[_HIDDEN] += len(folders) - len(shown)
            places = {name: os.path.join(parent, name) for name in shown}
            tops.extend(place for place in places.values() if os.path.islink(place))
            folders[:] = [
                name
                for name, place in places.items()
                if not os.path.islink(place) and _identity(place) not in seen
            ]
            for name in sorted(names):
                if name.startswith("."):
                    passed[_HIDDEN] += 1
                else:
                    yield os.path.join(parent, name)


def _identity(path: str) -> tuple[int, int]:
    try:
        state = os.stat(path)
    except OSError as error:
        raise UserError(f"folder {path} cannot be read ({error.strerror}): change its permissions") from error
    return state.st_dev, state.st_ino


def _holds_json_lines(file: CorpusFile, text_field: str) -> bool:
    """Whether a `.json` file has one object a line: two lines that begin like objects, or one document."""
    if file.num_bytes == 0:
        return True
    with open_content(file) as stream:
        head = stream.read(_PROBE_BYTES)
    lines = [line for line in head.removeprefix(b"\xef\xbb\xbf").splitlines() if line.strip()]
    if len(lines) != 1 or len(head) == _PROBE_BYTES:
        return all(line.lstrip().startswith(b"{") for line in lines[:2])
    try:
        return has_field(json.loads(lines[0]), text_field)
    except (ValueError, RecursionError):
        return False


def _fixed_part(pattern: str) -> str:
    parts = Path(pattern).parts
    count = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return str(Path(*parts[:count]))


def _corpus_file(path: str, *, root: str, source: str, extra: frozenset[str]) -> CorpusFile:
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
        is_text=suffix_of(path) in extra.difference(_ALWAYS),
    )
