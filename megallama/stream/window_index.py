"""The starts of windows for `data.packing=cut`, computed once and kept in a file that ranks share.

The file is worked out in one pass over the documents, in bounded memory. One process of a machine does
it while the others wait for its lock; without locks (some network file systems) each writes its own and
the last rename wins, which is harmless since all are equal. It ends with a digest of itself: a damaged one
would change what a run is trained on, so it is made anew.
"""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megallama.host.errors import UserError
from megallama.host.files import replacing
from megallama.host.limits import map_file, too_many_open
from megallama.stream.source import TokenSource

log = logging.getLogger(__name__)

_WINDOWS_AT_ONCE = 1 << 16
_DIGEST_BYTES = 32
_READ_BYTES = 1 << 20
_NUMBER = np.dtype("<i8")


def load_window_starts(source: TokenSource, *, seq_len: int, folder: Path) -> npt.NDArray[np.int64]:
    """First token of each window of `source`, mapped from a file in `folder`, which is made if it is missing.

    Raises:
        UserError: the folder cannot be written.
    """
    path = folder / f"{source.identity}-{seq_len}.starts"
    try:
        if not _is_intact(path):
            folder.mkdir(parents=True, exist_ok=True)
            with _lock(path.with_suffix(".lock")):
                if path.exists() and not _is_intact(path):
                    log.warning("index %s of data source %s is damaged: made anew", path, source.name)
                if not _is_intact(path):
                    _write(path, source, seq_len)
        count = (path.stat().st_size - _DIGEST_BYTES) // _NUMBER.itemsize
        if count == 0:
            return np.empty(0, dtype=np.int64)
        return np.frombuffer(map_file(path), dtype=_NUMBER, count=count)
    except OSError as error:
        raise too_many_open(error) or UserError(
            f"index of data source {source.name} cannot be kept in {folder} ({error.strerror}): free space there"
            " or choose another train.run_dir"
        ) from error


def window_starts(source: TokenSource, *, seq_len: int) -> Iterator[int]:
    """First token of each window: a document's beginning, and so on with the first one at or after its end."""
    due = 0
    for part in source.document_starts_in_parts():
        starts = part.tolist()  # a list is searched many times faster than an array
        at = bisect.bisect_left(starts, due)
        while at < len(starts):
            start = starts[at]
            if start + seq_len + 1 > source.num_tokens:
                return
            yield start
            due = start + seq_len
            at = bisect.bisect_left(starts, due, at)


def _write(path: Path, source: TokenSource, seq_len: int) -> None:
    with replacing(path, has_rivals=True) as stream:
        part: list[int] = []
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for start in window_starts(source, seq_len=seq_len):
            part.append(start)
            if len(part) == _WINDOWS_AT_ONCE:
                _flush(stream, part, digest)
        _flush(stream, part, digest)
        stream.write(digest.digest())


def _flush(stream: BinaryIO, part: list[int], digest: hashlib.blake2b) -> None:
    raw = np.array(part, dtype=_NUMBER).tobytes()
    digest.update(raw)
    stream.write(raw)
    part.clear()


def _is_intact(path: Path) -> bool:
    """Whether the file is there and what was written."""
    try:
        size = path.stat().st_size
        if size < _DIGEST_BYTES or (size - _DIGEST_BYTES) % _NUMBER.itemsize:
            return False
        digest, left = hashlib.blake2b(digest_size=_DIGEST_BYTES), size - _DIGEST_BYTES
        with path.open("rb") as stream:
            while left:
                raw = stream.read(min(left, _READ_BYTES))
                if not raw:
                    return False
                digest.update(raw)
                left -= len(raw)
            return stream.read() == digest.digest()
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, "ab") as stream:
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
