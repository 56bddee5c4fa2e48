"""What this process may use: memory, and open files, which are mapped without a descriptor each."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import weakref
from pathlib import Path

from megallama.host.errors import UserError

_ENOUGH = 1 << 16

_GROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


def map_file(path: str | Path) -> memoryview:
    """The bytes of a file that is not empty, mapped read-only as long as somebody holds them.

    Python's `mmap` keeps a descriptor for each (until 3.13): some hundred files exceed the usual limit of 1,024.

    Raises:
        OSError: it cannot be opened or mapped.
    """
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, stream.fileno(), 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    content = (ctypes.c_ubyte * size).from_address(address)
    # Not at exit: threads may still read then, and the process ends anyway.
    weakref.finalize(content, _libc.munmap, address, size).atexit = False
    return memoryview(content).cast("B").toreadonly()


def raise_limit() -> None:
    """Let this process and those that it starts open as many files as it may allow itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def too_many_open(error: OSError) -> UserError | None:
    """The message for an error of that kind; None for any other error."""
    if error.errno not in (errno.EMFILE, errno.ENFILE):
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return UserError(
        f"too many open files (this process may open {soft}; {error.filename or 'no name'} could not be opened): raise"
        " the limit (ulimit -n 65536; in a batch script before the command), or prepare the data in fewer, larger files"
    )


def user_error_of(error: UserError | OSError) -> UserError | None:
    """What to tell the user of `error`, which nobody nearer to its cause has put into words; None: it is a fault."""
    return error if isinstance(error, UserError) else too_many_open(error)


def memory_bytes() -> int:
    """Memory of the machine, or what a container or batch job is given of it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for place in _GROUP_LIMITS:
        try:
            limits.append(int(Path(place).read_text()))
        except (OSError, ValueError):  # another version of control groups, or "max"
            continue
    return min(limits)
