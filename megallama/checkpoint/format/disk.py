"""Reading and writing of single files: synchronised to disk, with errors that name the file and the remedy."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megallama.checkpoint.format.record import FileRecord, new_digest
from megallama.host.errors import DamagedError, UserError

_READ_BYTES = 8 * 1024 * 1024
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing(path: Path, *, needed_bytes: int) -> Iterator[None]:
    """Turns a failure to write `path` into a UserError; `needed_bytes` is what this rank writes in all."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise UserError(
                no_space_text(path, needed_bytes=needed_bytes, reason=str(error.strerror))
            ) from error
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): check the disk and its permissions"
        ) from error


def no_space_text(path: Path, *, needed_bytes: int, reason: str) -> str:
    """One message for a disk that is full or will be."""
    return (
        f"no room for the checkpoint at {path} ({reason}; {needed_bytes} bytes needed,"
        f" {free_bytes(path)} free): free some space, lower checkpoint.keep or move train.run_dir;"
        " older checkpoints are untouched"
    )


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the disk of `path` or of its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


class Disk:
    """How the bytes of a checkpoint are written. A derived class may throttle, count or fake it."""

    def free_bytes(self, path: Path) -> int:
        """Bytes that this user may still write on the disk of `path`; a save that needs more is not begun."""
        return free_bytes(path)

    def write(self, fd: int, data: memoryview) -> None:
        """Write all of `data`. A nearly full disk takes a part first and only then refuses.

        The threads that write one checkpoint call this at the same time.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        while data:
            data = data[os.write(fd, data) :]


LOCAL_DISK = Disk()


def write_file(path: Path, raw: bytes, *, disk: Disk = LOCAL_DISK) -> FileRecord:
    """Creates `path` with `raw` and waits until it is on the disk."""
    with writing(path, needed_bytes=len(raw)):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            disk.write(fd, memoryview(raw))
            os.fsync(fd)
        finally:
            os.close(fd)
    digest = new_digest()
    digest.update(raw)
    return FileRecord(len(raw), digest.hexdigest())


@contextmanager
def reading(path: Path) -> Iterator[int]:
    """File descriptor of the regular file `path`; a symbolic link is refused, it could lead anywhere.

    Raises:
        DamagedError: missing or not a regular file.
        UserError: cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise DamagedError(f"{path.name} is missing") from error
    except OSError as error:
        raise _read_error(path, error) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise DamagedError(f"{path.name} is not a regular file")
        yield fd
    except OSError as error:
        raise _read_error(path, error) from error
    finally:
        os.close(fd)


def _read_error(path: Path, error: OSError) -> UserError:
    if error.errno == errno.ELOOP:
        return DamagedError(f"{path.name} is a symbolic link")
    if error.errno == errno.EIO:  # a bad block: an older checkpoint may still be readable
        return DamagedError(f"{path.name} cannot be read from the disk ({error.strerror})")
    return UserError(f"cannot read {path} ({error.strerror or error}): check its permissions and the disk")


def read_exactly(fd: int, buffer: memoryview, *, position: int, name: str) -> None:
    """Fills `buffer` from byte `position` on.

    Raises:
        DamagedError: the file `name` ends before.
    """
    while buffer:
        count = os.preadv(fd, [buffer], position)
        if count == 0:
            raise DamagedError(f"{name} ends at byte {position}")
        buffer, position = buffer[count:], position + count


def read_file(path: Path, *, limit_bytes: int) -> bytes:
    """All of `path`, which may not have more than `limit_bytes`."""
    with reading(path) as fd:
        size = os.fstat(fd).st_size
        if size > limit_bytes:
            raise DamagedError(f"{path.name} has {size} bytes, at most {limit_bytes} can be right")
        raw = bytearray(size)
        read_exactly(fd, memoryview(raw), position=0, name=path.name)
    return bytes(raw)


def file_problem(path: Path, record: FileRecord) -> str | None:
    """How `path` differs from what was written, or None. Reads the whole file.

    Raises:
        UserError: it may not be read.
    """
    try:
        with reading(path) as fd:
            size = os.fstat(fd).st_size
            if size != record.size_bytes:
                return f"{path.name} has {size} bytes, the manifest says {record.size_bytes}"
            digest, position = new_digest(record.algorithm), 0
            block = memoryview(bytearray(min(size, _READ_BYTES)))
            while position < size:
                part = block[: size - position]
                read_exactly(fd, part, position=position, name=path.name)
                digest.update(part)
                position += len(part)
    except DamagedError as error:
        return str(error)
    if digest.hexdigest() != record.digest:
        return f"{path.name} does not match its checksum"
    return None
