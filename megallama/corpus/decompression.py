"""Compressed corpus files as streams of their content; damage raises an error and never shortens the text."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import zstandard

from megallama.corpus.files import CorpusFile, check_unchanged, open_file, unreadable
from megallama.host.errors import UserError

_INPUT_BYTES = {".zst": 1 << 14, ".xz": 1 << 10, ".bz2": 1 << 10}
"""Compressed bytes at once: what comes out may be thousands of times as many."""
_FRAMES: dict[str, Callable[[], Any]] = {
    ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
    ".xz": lzma.LZMADecompressor,
    ".bz2": bz2.BZ2Decompressor,
}
"""By the ending of a file, what reads one of the frames that it consists of."""


@contextmanager
def open_content(file: CorpusFile) -> Iterator[IO[bytes]]:
    """The content of `file`, decompressed; that the file stayed the same is checked at the end.

    Raises:
        UserError: it cannot be read, is damaged or ends too early, or changed meanwhile.
    """
    with open_file(file.path) as stream:
        try:
            if file.compression == ".gz":
                with gzip.GzipFile(fileobj=stream, mode="rb") as unpacked:
                    yield io.BufferedReader(unpacked, 1 << 20)
            elif file.compression:
                yield io.BufferedReader(_FramedStream(stream, file.compression), 1 << 20)
            else:
                yield stream
        except (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
            if (
                isinstance(error, OSError) and error.errno is not None
            ):  # gzip and bz2 say damage without a number
                raise unreadable(file.path, error) from error
            check_unchanged(file)  # half a file looks damaged too
            raise UserError(
                f"file {file.path} is damaged ({str(error) or type(error).__name__}): copy it again or leave it out"
            ) from error
        check_unchanged(file)


class _FramedStream(io.RawIOBase):
    """Content of a file of any number of frames, one after another.

    The libraries' own readers take less than all for the whole: zstandard 0.25's a file that is cut short, those of
    Python 3.11 for xz and bz2 one whose second frame is damaged.
    """

    def __init__(self, stream: IO[bytes], compression: str) -> None:
        self._stream = stream
        self._new_frame = _FRAMES[compression]
        self._input_bytes = _INPUT_BYTES[compression]
        self._padding = b"\0" if compression == ".xz" else b""  # which may stand between its frames
        self._frame = self._new_frame()
        self._is_inside = False
        self._compressed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        while not self._content:
            if not self._compressed:
                self._compressed = self._stream.read(self._input_bytes)
                if not self._compressed:
                    if self._is_inside:
                        raise EOFError("it ends in the middle of a frame")
                    return 0
            if not self._is_inside:
                self._compressed = (
                    self._compressed.lstrip(self._padding) if self._padding else self._compressed
                )
                if not self._compressed:
                    continue
            self._content = memoryview(self._frame.decompress(self._compressed))
            self._is_inside = not self._frame.eof
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = self._new_frame()
        count = min(len(target), len(self._content))
        target[:count] = self._content[:count]
        self._content = self._content[count:]
        return count
