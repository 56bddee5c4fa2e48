"""The TensorBoard sink."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path


class TensorBoardSink:
    """One event file a process; after a resume TensorBoard drops the steps that are done again."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """Open an event file in `folder`; the next step is `first_step` + 1."""
        # Imported here: it takes a moment, and a run may do without.
        from torch.utils.tensorboard import SummaryWriter

        self._excepthook = threading.excepthook
        threading.excepthook = self._leave_to_next_write
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add one scalar a key; `progress/step` is the axis already.

        Raises:
            OSError: the events of an earlier step could not be written.
        """
        for key, value in numbers.items():
            if key != "progress/step":
                self._writer.add_scalar(key, value, global_step=step)

    def close(self) -> None:
        """Flush and end the event file."""
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._excepthook

    def _leave_to_next_write(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread prints a failure of the disk, and its next call raises it once more."""
        is_writer = type(failure.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(failure.exc_value, OSError)):
            self._excepthook(failure)
