"""The hook that turns each finished step into metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from megallama.host.errors import UserError
from megallama.metrics.meter import Meter, Progress
from megallama.metrics.recorder import Recorder
from megallama.trainer.hooks.base import Hook, RunView, StepReport
from megallama.trainer.state import TrainState


class OpenRecorder(Protocol):
    """Opens the sinks of a run."""

    def __call__(self, *, first_step: int) -> Recorder:
        """Sinks that go on after `first_step` completed steps."""


class MetricsHook(Hook):
    """Feeds the meter and the sinks; rank 0 has one."""

    def __init__(self, meter: Meter, open_recorder: OpenRecorder) -> None:
        self._meter = meter
        self._open_recorder = open_recorder
        self._recorder: Recorder | None = None

    def start(self, state: TrainState, run: RunView) -> None:
        """Open the sinks where the run stands."""
        self._folder: Path = run.folder
        with self._trouble_told():
            self._recorder = self._open_recorder(first_step=state.step)

    def after_step(self, state: TrainState, report: StepReport) -> None:
        """Record one step, with what earlier hooks added to it."""
        assert self._recorder is not None
        progress = Progress(state.step, state.consumed_samples, state.consumed_tokens)
        numbers = self._meter.measure(report.result, progress=progress, seconds=report.seconds)
        with self._trouble_told():
            self._recorder.record(state.step, {**numbers, **report.numbers})

    def finish(self, state: TrainState) -> None:
        """Close the sinks."""
        if self._recorder is not None:
            with self._trouble_told():
                self._recorder.close()

    @contextmanager
    def _trouble_told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"metrics cannot be written to {self._folder} ({error.strerror or error}): free some space"
                " there, or make its files writable; the same command resumes from the last checkpoint"
            ) from error
