"""The training loop: steps and hooks, nothing of parallelism, so that a fake engine can drive it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any, Protocol

from megallama.engine.step import StepResult
from megallama.trainer.hooks.base import Hook, RunView, StepReport, StopTraining
from megallama.trainer.state import TrainState


class StepEngine(Protocol):
    """What the loop needs of the engine."""

    def train_step(self, step: int, batches: Sequence[Any]) -> StepResult:
        """One optimizer step."""


class BatchSource(Protocol):
    """What the loop needs of the data."""

    def batches(self, step: int) -> Sequence[Any]:
        """This rank's micro-batches of `step`."""


class Loop:
    """Runs steps until `steps` are completed.

    Args:
        engine: Takes the steps.
        loader: Gives the micro-batches of a step.
        state: Where the run stands; a resumed one does not begin at 0.
        run: What hooks may look at.
        hooks: Called in this order after each step.
        steps: Optimizer steps of the whole run.
        samples_per_step: Sequences of one step over the job.
        tokens_per_step: Tokens of one step over the job.
    """

    def __init__(
        self,
        engine: StepEngine,
        loader: BatchSource,
        *,
        state: TrainState,
        run: RunView,
        hooks: Sequence[Hook],
        steps: int,
        samples_per_step: int,
        tokens_per_step: int,
    ) -> None:
        self.engine = engine
        self.loader = loader
        self.state = state
        self.run = run
        self.hooks = tuple(hooks)
        self.steps = steps
        self.samples_per_step = samples_per_step
        self.tokens_per_step = tokens_per_step

    def fit(self) -> bool:
        """Train. Returns whether all steps are completed (False after a requested stop)."""
        # Every hook finishes, in this order, also when another one fails at it.
        with contextlib.ExitStack() as stack:
            for hook in reversed(self.hooks):
                stack.callback(hook.finish, self.state)
            try:
                for hook in self.hooks:
                    hook.start(self.state, self.run)
                while self.state.step < self.steps:
                    report = self._step()
                    for hook in self.hooks:
                        hook.after_step(self.state, report)
            except StopTraining:
                return False
        return True

    def _step(self) -> StepReport:
        started = time.perf_counter()
        batches = self.loader.batches(self.state.step)
        result = self.engine.train_step(self.state.step, batches)
        self.state.advance(samples=self.samples_per_step, tokens=self.tokens_per_step)
        return StepReport(result, seconds=time.perf_counter() - started)
