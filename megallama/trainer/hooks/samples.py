"""The hook that writes the samples of each step to a file of the run folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megallama.host.errors import UserError
from megallama.metrics.jsonl import STEP, StepLines
from megallama.trainer.hooks.base import Hook, StepReport
from megallama.trainer.state import TrainState


class SamplesHook(Hook):
    """Writes a line a step; rank 0 has one, and computes the ids of all ranks."""

    def __init__(
        self, path: Path, sample_ids: Callable[[int], dict[str, Any]], *, completed_steps: int
    ) -> None:
        """Go on after the line of the last completed step.

        `sample_ids` is asked for steps counted from 0; lines count them as metrics do, from 1.

        Raises:
            UserError: the file cannot be written, or holds something else.
        """
        self._path = path
        self._sample_ids = sample_ids
        try:
            self._lines = StepLines(path, first_step=completed_steps)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} cannot be continued ({error}): move it away, or set log.samples=false"
            ) from error

    def after_step(self, state: TrainState, report: StepReport) -> None:
        """Record the step just completed."""
        line = json.dumps({STEP: state.step, **self._sample_ids(state.step - 1)}, ensure_ascii=False)
        with self._full_disk_told():
            self._lines.append(line + "\n")

    def finish(self, state: TrainState) -> None:
        """Have all of it on the disk."""
        with self._full_disk_told():
            self._lines.close()

    @contextmanager
    def _full_disk_told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written ({error.strerror or error}): free some space there, or set"
                " log.samples=false; the same command resumes from the last checkpoint"
            ) from error
