"""The lines of a file: where they end, which are blank, and where a reader that starts anywhere finds the next one.

Lines end with LF, or CR and LF; in a file without any LF, as old Macs wrote, with CR.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from functools import lru_cache
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


@lru_cache(maxsize=1024)  # each stretch of a file asks
def ends_with_cr(file: CorpusFile) -> bool:
    """Whether the lines of `file` end with CR alone: it has CR and no LF. It is read up to the first LF.

    Raises:
        UserError: as `open_content`.
    """
    has_cr = False
    with open_content(file) as stream:
        while block := stream.read(_PROBE_BYTES):
            if b"\n" in block:
                return False
            has_cr = has_cr or b"\r" in block
    return has_cr


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
