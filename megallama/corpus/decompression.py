"""Compressed corpus files as streams of their content; damage raises an error and never shortens the text."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import zstandard

from megallama.corpus.files import CorpusFile, check_unchanged, open_file, unreadable
from megallama.host.errors import UserError

_INPUT_BYTES = 1 << 14
"""Compressed bytes at once: what comes out may be thousands of times as many."""


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
            elif file.compression == ".zst":
                yield io.BufferedReader(_ZstdStream(stream), 1 << 20)
            else:
                yield stream
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            check_unchanged(file)  # half a file looks damaged too
            raise UserError(
                f"file {file.path} is damaged ({str(error) or type(error).__name__}): copy it again or leave it out"
            ) from error
        except OSError as error:
            raise unreadable(file.path, error) from error
        check_unchanged(file)


class _ZstdStream(io.RawIOBase):
    """Content of a zstd file of any number of frames. zstandard 0.25's own reader takes a cut file for a whole one."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._is_inside = False
        self._compressed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        while not self._content:
            if not self._compressed:
                self._compressed = self._stream.read(_INPUT_BYTES)
                if not self._compressed:
                    if self._is_inside:
                        raise EOFError("it ends in the middle of a frame")
                    return 0
            self._content = memoryview(self._frame.decompress(self._compressed))
            self._is_inside = not self._frame.eof
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
        count = min(len(target), len(self._content))
        target[:count] = self._content[:count]
        self._content = self._content[count:]
        return count
