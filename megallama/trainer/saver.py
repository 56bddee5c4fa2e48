"""Decides when a run is saved, and what a failed save means for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from megallama.checkpoint.distributed.background import SaveOutcome
from megallama.checkpoint.format.boxes import BoxedTensor
from megallama.checkpoint.format.record import JSON
from megallama.config.schema import CheckpointConfig
from megallama.trainer.hooks.base import Hook, StepReport
from megallama.trainer.state import TrainState

log = logging.getLogger(__name__)


class Background(Protocol):
    """What the saver needs of `BackgroundSaver`."""

    @property
    def is_running(self) -> bool:
        """Whether a save is under way."""

    def reserve(self, tensors: Mapping[str, BoxedTensor]) -> None:
        """Take the memory for the copy."""

    def start(self, *, step: int, tensors: Mapping[str, BoxedTensor], state: Mapping[str, JSON]) -> None:
        """Copy, and write meanwhile."""

    def wait(self) -> SaveOutcome | None:
        """How the save under way ended."""

    def save_now(self, *, step: int, tensors: Mapping[str, BoxedTensor], state: Mapping[str, JSON]) -> None:
        """Save, and return when it is done."""


class Saver:
    """Saves this run, each step at most once. Every rank calls the same methods in the same order.

    Args:
        background: Writes the checkpoints.
        config: When to save.
        is_first: Whether this is rank 0, which reports failures.
        tensors: What is saved, as it is now.
        check: Raises where the state is such that no checkpoint may take the place of an older one.
        describe: What else belongs to a checkpoint of that progress: plain JSON by key.
        saved_step: The checkpoint that this run resumed from; None for a new run.
    """

    def __init__(
        self,
        background: Background,
        config: CheckpointConfig,
        *,
        is_first: bool,
        tensors: Callable[[], Mapping[str, BoxedTensor]],
        check: Callable[[TrainState, Mapping[str, BoxedTensor]], None],
        describe: Callable[[TrainState], Mapping[str, JSON]],
        saved_step: int | None,
    ) -> None:
        self._background = background
        self._config = config
        self._is_first = is_first
        self._tensors = tensors
        self._check = check
        self._describe = describe
        self._saved_step = saved_step
        self._failures = 0
        self._has_warned_of_waiting = False
        self._numbers: dict[str, float] = {}

    def reserve(self) -> None:
        """Take the memory that background saves need, if there will be any."""
        if self._config.async_save and self._config.interval > 0:
            self._background.reserve(self._tensors())

    def save(self, state: TrainState) -> None:
        """Save in the background, or at once where the configuration says so; unless this step is saved already.

        Raises:
            UserError: the state may not be saved.
        """
        if not self._config.async_save:
            self.save_now(state)
            return
        began = time.perf_counter()
        self._wait_for_room()
        waited = time.perf_counter()
        if state.step != self._saved_step:
            self._background.start(
                step=state.step, tensors=self._checked_tensors(state), state=self._describe(state)
            )
            self._saved_step = state.step
        self._numbers["checkpoint/wait_ms"] = 1e3 * (waited - began)
        self._numbers["checkpoint/stall_ms"] = 1e3 * (time.perf_counter() - began)

    def save_now(self, state: TrainState) -> None:
        """Finish the save under way, and have this step on the disk on return.

        Raises:
            UserError: it cannot be saved.
        """
        self.finish()
        if state.step == self._saved_step:
            return
        began = time.perf_counter()
        self._background.save_now(
            step=state.step, tensors=self._checked_tensors(state), state=self._describe(state)
        )
        self._saved_step = state.step
        self._numbers["checkpoint/stall_ms"] = 1e3 * (time.perf_counter() - began)

    def finish(self) -> None:
        """Wait for the save under way, if there is one, and report it."""
        outcome = self._background.wait()
        if outcome is None:
            return
        if outcome.problem is None:
            self._numbers["checkpoint/save_s"] = outcome.seconds
            log.info("saved step %d in %.1f s", outcome.step, outcome.seconds)
            return
        if self._saved_step == outcome.step:
            self._saved_step = None
        self._failures += 1
        self._numbers["checkpoint/failures"] = self._failures
        if self._is_first:
            log.warning("step %d was not saved, training goes on: %s", outcome.step, outcome.problem)

    def take_numbers(self) -> dict[str, float]:
        """Metrics of saves since the last call."""
        if not self._background.is_running:
            self.finish()
        numbers, self._numbers = self._numbers, {}
        return numbers

    def _checked_tensors(self, state: TrainState) -> Mapping[str, BoxedTensor]:
        tensors = self._tensors()
        self._check(state, tensors)
        return tensors

    def _wait_for_room(self) -> None:
        """One save at a time: a step that is due before the last save has ended waits for it."""
        is_late, began = self._background.is_running, time.perf_counter()
        self.finish()
        waited_s = time.perf_counter() - began
        if is_late and self._is_first and not self._has_warned_of_waiting:
            self._has_warned_of_waiting = True
            log.warning(
                "a save takes longer than checkpoint.interval (%d steps): training waited %.1f s for it;"
                " raise checkpoint.interval",
                self._config.interval,
                waited_s,
            )


class SaveReportHook(Hook):
    """Adds the numbers of saves to the first step after them; comes before the hook that records metrics."""

    def __init__(self, saver: Saver) -> None:
        self._saver = saver

    def after_step(self, state: TrainState, report: StepReport) -> None:
        """Add what there is."""
        report.numbers.update(self._saver.take_numbers())
