"""Logging: one file per rank, and warnings of rank 0 also on stderr."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def start_log(folder: Path, *, rank: int) -> logging.Handler:
    """Write this package's log from INFO up, and every library's warnings, to `folder/rank-NNNNN.log`.

    Returns the handler, to be closed with `stop_log`: a process that runs several jobs has a log for each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handler = _FileHandler(folder / f"rank-{rank:05d}.log", encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    package = logging.getLogger("megallama")
    package.setLevel(logging.INFO)
    if rank == 0 and not any(isinstance(h, logging.StreamHandler) for h in package.handlers):
        console = logging.StreamHandler(sys.stderr)
        console.setLevel(logging.WARNING)
        console.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        package.addHandler(console)
    logging.captureWarnings(True)
    return handler


class _FileHandler(logging.FileHandler):
    """Loses lines on a full disk, where logging would show a traceback for each: what matters is raised elsewhere."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Only for the disk."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        """What cannot be flushed is lost."""
        with contextlib.suppress(OSError):
            super().close()


def stop_log(handler: logging.Handler) -> None:
    """Close what `start_log` opened."""
    logging.getLogger().removeHandler(handler)
    handler.close()


@contextlib.contextmanager
def stderr_in(path: Path) -> Iterator[None]:
    """Standard error of this process goes to `path` for the block: programs that it starts there keep it so.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        sys.stderr.flush()
        before = os.dup(2)
        try:
            os.dup2(file.fileno(), 2)
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)


def quiet_libraries() -> None:
    """Drop megatron-core's warnings about optional packages that are absent: our kernels log what they chose.

    Call it before megatron-core is imported.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
