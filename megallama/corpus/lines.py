"""The lines of a file: where they end, which are blank, and where a reader that starts anywhere finds the next one.

Lines end with LF, or CR and LF. A file of CR alone, as old Macs wrote, is known by its beginning.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from typing import IO, Any

from megallama.corpus.decompression import open_content
from megallama.corpus.files import CorpusFile

BLOCK_BYTES = 1 << 20

_PROBE_BYTES = 1 << 16
_CHANGED_PLACES = bytes.maketrans(b"\r\n", b"\n\r")
# What str.isspace says, as U+3000 between Chinese paragraphs, and two characters of no width.
_WHITE = [chr(code) for code in range(0x3001) if chr(code).isspace()] + ["\u200b", "\ufeff"]
_BLANK = re.compile(b"(?:%b)*" % b"|".join(re.escape(white.encode()) for white in _WHITE))


def is_blank(line: bytes) -> bool:
    """Whether nothing is to be seen in a line: white space of any language, or nothing."""
    return _BLANK.fullmatch(line) is not None


def ends_with_cr(file: CorpusFile) -> bool:
    """Whether the lines of `file` end with CR alone.

    Raises:
        UserError: as `open_content`.
    """
    with open_content(file) as stream:
        head = stream.read(_PROBE_BYTES)
    # What follows a CR at the very end may be its LF.
    return b"\r" in head.rstrip(b"\r") and b"\n" not in head


def changed_places(content: bytes) -> bytes:
    """`content` with LF for CR and CR for LF."""
    return content.translate(_CHANGED_PLACES)


def with_changed_places(stream: IO[bytes]) -> IO[bytes]:
    """`stream` with LF for CR and CR for LF: lines that end with CR can be read as others."""
    return io.BufferedReader(_ChangedPlaces(stream), BLOCK_BYTES)


def to_line_start(stream: IO[bytes]) -> None:
    """Moves `stream` behind the next line end, or to its end."""
    while (part := stream.readline(BLOCK_BYTES)) and not part.endswith(b"\n"):
        pass


def to_boundary(stream: IO[bytes], is_boundary: Callable[[bytes], bool]) -> None:
    """Moves `stream` from anywhere behind the next line that is a boundary for certain, or to its end."""
    to_line_start(stream)
    is_start = True
    while line := stream.readline(BLOCK_BYTES):
        if is_start and len(line) < BLOCK_BYTES and is_boundary(line):
            return
        is_start = line.endswith(b"\n")


class _ChangedPlaces(io.RawIOBase):
    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._stream.seekable()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        content = self._stream.read(len(target))
        target[: len(content)] = changed_places(content)
        return len(content)
