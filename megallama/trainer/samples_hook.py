"""Which samples each step took, in a file of the run folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megallama.host.errors import UserError
from megallama.metrics.jsonl import STEP, StepLines
from megallama.trainer.hooks import Hook, StepReport
from megallama.trainer.state import TrainState


class SamplesHook(Hook):
    """Writes a line a step; rank 0 has one, and computes the ids of all ranks."""

    def __init__(self, path: Path, sample_ids: Callable[[int], dict[str, Any]]) -> None:
        """`sample_ids` is asked for steps counted from 0; lines count them as metrics do, from 1."""
        self._path = path
        self._sample_ids = sample_ids
        self._lines: StepLines | None = None

    def start(self, state: TrainState) -> None:
        """Go on after the line of the last completed step."""
        try:
            self._lines = StepLines(self._path, first_step=state.step)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self._path} cannot be continued ({error}): move it away, or set log.samples=false"
            ) from error

    def after_step(self, state: TrainState, report: StepReport) -> None:
        """Record the step just completed."""
        assert self._lines is not None
        line = json.dumps({STEP: state.step, **self._sample_ids(state.step - 1)}, ensure_ascii=False)
        self._tell_full_disk(lambda lines: lines.append(line + "\n"))

    def finish(self, state: TrainState) -> None:
        """Have all of it on the disk."""
        self._tell_full_disk(StepLines.close)

    def _tell_full_disk(self, does: Callable[[StepLines], None]) -> None:
        try:
            if self._lines is not None:
                does(self._lines)
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written ({error.strerror or error}): free some space there, or set"
                " log.samples=false; the same command goes on from the last checkpoint"
            ) from error
