"""Files that appear whole or not at all: written beside their place, flushed to the disk, and renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path, *, has_rivals: bool = False) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` once the block ends and its bytes are on the disk.

    After a crash `path` is the old file or the new one, never half of one; an exception in the block leaves the old
    one. That the name survives a power failure takes `fsync_folder` too.

    Args:
        path: The file.
        has_rivals: Several processes may write it at once; each then writes under a name of its own.
    """
    mark = f".{os.getpid()}-{secrets.token_hex(4)}" if has_rivals else ""
    partial = path.with_name(f"{path.name}{mark}.partial")
    try:
        with open(partial, "wb", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes, *, has_rivals: bool = False) -> None:
    """Write `content` as `replacing` does."""
    with replacing(path, has_rivals=has_rivals) as file:
        file.write(content)


def fsync_folder(path: Path) -> None:
    """Wait until the names in `path` are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
