"""The hook that records the traffic of each step as metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megallama.engine.step import StepResult
from megallama.metrics.traffic_meter import TrafficMeter, to_metrics
from megallama.trainer.hooks.base import Hook, StepReport
from megallama.trainer.loop import StepEngine
from megallama.trainer.state import TrainState


class MeteredEngine(Hook):
    """Takes the steps of `engine` with the meter on, so that evaluation and checkpoints are not counted."""

    def __init__(self, engine: StepEngine, meter: TrafficMeter) -> None:
        self._engine = engine
        self._meter = meter

    def train_step(self, step: int, batches: Sequence[Any]) -> StepResult:
        """One optimizer step."""
        with self._meter:
            return self._engine.train_step(step, batches)

    def after_step(self, state: TrainState, report: StepReport) -> None:
        """Add `traffic/<group>/<operation>/<format>_bytes` of this rank to the step."""
        report.numbers |= to_metrics(self._meter.take())
