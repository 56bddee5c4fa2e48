"""TensorBoard events of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


class TensorBoardSink:
    """One event file a process; after a resume TensorBoard drops the steps that are done again."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """Open an event file in `folder`; the next step is `first_step` + 1."""
        # Imported here: it takes a moment, and a run may do without.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add one scalar a key; `progress/step` is the axis already."""
        for key, value in numbers.items():
            if key != "progress/step":
                self._writer.add_scalar(key, value, global_step=step)

    def close(self) -> None:
        """Flush and end the event file."""
        self._writer.close()
