"""Which files of a corpus the given paths mean, and how many are passed over, for which reason."""

from __future__ import annotations

import glob
import json
import os
import re
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
_PROBE_LINES = 10
_KEY_OF_TEXT = re.compile(rb'("[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z))(\s*:\s*(?="))?', re.DOTALL)
"""A JSON string, and behind it what makes it a key whose value is one too."""
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
        text_field: By which a `.json` file below an input is known to hold documents.
        passed_over: Is told how many files below the inputs are not among those returned, by reason.

    Raises:
        UserError: an input that does not exist, is no regular file, cannot be read, has another
            suffix, or matches nothing.
    """
    if not inputs:
        raise UserError("no input (0 given): name text files, folders or globs")
    passed: dict[str, str] = {}
    extra = frozenset("." + suffix.lower().lstrip(".") for suffix in suffixes)
    found: list[CorpusFile] = []
    for item in inputs:
        found.extend(_expand(str(item), extra, text_field=text_field, passed=passed))
    once: dict[str, CorpusFile] = {}
    for file in found:
        real = os.path.realpath(file.path)
        if once.setdefault(real, file) is not file:
            passed[real] = _TWICE
    if passed_over is not None:
        passed_over.update(passed.values())
    return list(once.values())


def describe_passed_over(passed_over: Counter[str]) -> str:
    """The counts as one line."""
    return ", ".join(f"{count:,} {reason}" for reason, count in passed_over.most_common())


def _expand(item: str, extra: frozenset[str], *, text_field: str, passed: dict[str, str]) -> list[CorpusFile]:
    """The files of one input. `passed` gets the reason for each place that is passed over, however often it is met."""
    wanted = extra.union(_ALWAYS, JSON_SUFFIXES)
    if os.path.isdir(item):
        found = list(
            _chosen(_walk([item], passed, set()), item, item, extra, text_field=text_field, passed=passed)
        )
    elif os.path.exists(item):
        if suffix_of(item) not in wanted:
            raise UserError(
                f"input {item} has the suffix {suffix_of(item)!r}, not one of {', '.join(sorted(wanted))}:"
                " add it to the suffixes to read it as text"
            )
        found = [_corpus_file(item, root=os.path.dirname(item), source=item, extra=extra)]
    elif glob.has_magic(item):
        matches = _matches(item)
        seen: set[tuple[int, int]] = set()
        paths = list(_walk(sorted(filter(os.path.isdir, matches), key=os.path.islink), passed, seen))
        # `**` matches folders and what is in them, which was found on the walk.
        paths += [
            match
            for match in matches
            if not os.path.isdir(match) and _identity(os.path.dirname(match) or ".") not in seen
        ]
        root = _fixed_part(item)
        found = list(_chosen(paths, root, item, extra, text_field=text_field, passed=passed))
    else:
        raise UserError(f"input {item} does not exist: give a file, a folder or a glob that matches")
    if not found:
        others = f" ({describe_passed_over(Counter(passed.values()))})" if passed else ""
        raise UserError(
            f"input {item} matches no file with suffix {', '.join(sorted(wanted))}{others}:"
            " change it or the suffixes"
        )
    return sorted(found, key=lambda file: file.relative)


def _matches(pattern: str) -> list[str]:
    """What `pattern` matches, each place once, though links may lead to it on many ways."""

    def way(match: str) -> tuple[bool, int, str]:
        return _place(match) != os.path.abspath(match), len(match), match

    matches = sorted(glob.glob(pattern, recursive=True), key=way)
    return sorted({_place(match): match for match in reversed(matches)}.values())


def _chosen(
    paths: Iterator[str] | Sequence[str],
    root: str,
    source: str,
    extra: frozenset[str],
    *,
    text_field: str,
    passed: dict[str, str],
) -> Iterator[CorpusFile]:
    """Those of `paths` that are read."""
    for path in paths:
        suffix = suffix_of(path)
        if suffix not in extra.union(_ALWAYS, JSON_SUFFIXES):
            ending = os.path.splitext(path)[1].lower()
            passed[os.path.realpath(path)] = f"ending {ending}" if suffix else "without an ending"
            continue
        file = _corpus_file(path, root=root, source=source, extra=extra)
        if suffix == ".json" and file.is_jsonl and not _holds_json_lines(file, text_field):
            passed[os.path.realpath(path)] = f".json without JSON lines that have {text_field!r}"
            continue
        yield file


def _walk(folders: list[str], passed: dict[str, str], seen: set[tuple[int, int]]) -> Iterator[str]:
    """Files below `folders`, those behind links to folders last, so that a file goes by its own path first.

    `seen` gets the folders, each of which is walked once.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"folder {error.filename} cannot be read ({error.strerror}): change its permissions")

    followed: set[str] = set()
    tops = deque(folders)
    while tops:
        top = tops.popleft()
        if _identity(top) in seen:
            if os.path.islink(top) and _place(top) not in followed:
                passed[_place(top)] = f"links to folders {_TWICE}"
            continue
        followed.add(_place(top))
        for parent, names_below, names in os.walk(top, onerror=refuse):
            seen.add(_identity(parent))
            hidden = [name for name in (*names_below, *names) if name.startswith(".")]
            passed.update({_place(os.path.join(parent, name)): _HIDDEN for name in hidden})
            places = {name: os.path.join(parent, name) for name in sorted(names_below) if name not in hidden}
            tops.extend(place for place in places.values() if os.path.islink(place))
            names_below[:] = [
                name
                for name, place in places.items()
                if not os.path.islink(place) and _identity(place) not in seen
            ]
            for name in sorted(names):
                if name not in hidden:
                    yield os.path.join(parent, name)


def _place(path: str) -> str:
    """The one path of `path` itself, which may be a link."""
    parent, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(parent), name)


def _identity(path: str) -> tuple[int, int]:
    try:
        state = os.stat(path)
    except OSError as error:
        raise UserError(f"folder {path} cannot be read ({error.strerror}): change its permissions") from error
    return state.st_dev, state.st_ino


def _holds_json_lines(file: CorpusFile, text_field: str) -> bool:
    """Whether a `.json` file has one object a line, and one of the first has text in its field."""
    if file.num_bytes == 0:
        return True
    with open_content(file) as stream:
        head = stream.read(_PROBE_BYTES)
    lines = [line for line in head.removeprefix(b"\xef\xbb\xbf").splitlines() if line.strip()]
    if not all(line.lstrip().startswith(b"{") for line in lines[:2]):
        return False
    return not lines or any(_has_text(line, text_field) for line in lines[:_PROBE_LINES])


def _has_text(line: bytes, text_field: str) -> bool:
    try:
        return has_field(json.loads(line), text_field)
    except (ValueError, RecursionError):  # broken, or cut off where the probe ends
        names = {text_field, text_field.rpartition(".")[2]}
        return any(key[2] and _string(key[1]) in names for key in _KEY_OF_TEXT.finditer(line))


def _string(content: bytes) -> str | None:
    try:
        return str(json.loads(content))
    except ValueError:
        return None


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
