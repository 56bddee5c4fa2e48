"""The hook interface and the general hooks: evaluation, loss guard, checkpoints, stop requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from megallama.engine.step import MIN_LOSS_SCALE, EvalResult, StepResult
from megallama.host.errors import UserError
from megallama.trainer.state import TrainState


@dataclass
class StepReport:
    """One completed step; hooks may add numbers for the sinks."""

    result: StepResult
    seconds: float
    """Wall time of the step, data included, hooks not."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Further metrics of this step by their key."""


@dataclass(frozen=True)
class ParameterPart:
    """What this rank owns of one parameter of the whole model. The parts of all ranks make it up, each element once."""

    name: str
    """Canonical name (docs/checkpoint-format.md), the same in every layout."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    boxes: Mapping[tuple[int, ...], torch.Tensor]
    """Place in the whole parameter -> view of the master weights there (fp32; fp64 under precision.dtype=fp64)."""


@dataclass(frozen=True)
class RunView:
    """What a hook may look at beside the progress."""

    rank: int
    """Global rank; every rank has its own copy of each hook."""
    world_size: int
    """Number of ranks."""
    folder: Path
    """The run folder."""
    parameters: Callable[[], Iterator[ParameterPart]]
    """Parts of parameters that this rank owns, as they are now, under every ZeRO stage; only to be read. Copies of what
    another rank owns are left out, so that sums over all ranks count each element once."""
    save: Callable[[TrainState], None]
    """Saves a checkpoint of this progress, if there is none yet, and returns when it is on the disk. All ranks call it,
    with the state that the hook was given."""


class Hook:
    """Does nothing; hooks override what they need.

    Every rank calls the same methods in the same order, so a hook may communicate, if it does so on all ranks.
    """

    def start(self, state: TrainState, run: RunView) -> None:
        """Before the first step; a resumed run does not begin at step 0."""

    def after_step(self, state: TrainState, report: StepReport) -> None:
        """After each completed step; `state` already counts it."""

    def finish(self, state: TrainState) -> None:
        """After the last step, also when a step failed."""


class EvalEngine(Protocol):
    """What evaluation needs of the engine."""

    def eval_step(self, batches: Sequence[Any]) -> EvalResult:
        """Losses of one global batch."""


class EvalHook(Hook):
    """Validation loss and perplexity every `interval` steps and after the last."""

    def __init__(
        self,
        engine: EvalEngine,
        batches: Callable[[], Sequence[Sequence[Any]]],
        *,
        interval: int,
        last_step: int,
    ) -> None:
        self._engine = engine
        self._batches = batches
        self._interval = interval
        self._last_step = last_step

    def after_step(self, state: TrainState, report: StepReport) -> None:
        """Evaluate when it is time, and add `eval/loss` and `eval/perplexity` to the step."""
        is_due = self._interval > 0 and state.step % self._interval == 0
        if not is_due and state.step != self._last_step:
            return
        results = [self._engine.eval_step(batches) for batches in self._batches()]
        loss = sum(r.loss_sum for r in results) / max(1, sum(r.num_tokens for r in results))
        report.numbers["eval/loss"] = loss
        report.numbers["eval/perplexity"] = math.exp(loss) if loss < 700 else math.inf


class GuardHook(Hook):
    """Stops the run at a loss or gradient that is no number, before it can reach a checkpoint."""

    def after_step(self, state: TrainState, report: StepReport) -> None:
        """Raise when the step went wrong.

        A step that fp16 skipped is no fault as long as its loss is a number and the loss scale can go lower: the scale
        multiplies gradients, not the loss that is reported.
        """
        result = report.result
        evaluated = report.numbers.get("eval/loss", 0.0)
        if not math.isfinite(result.loss):
            raise diverged(state.step, f"loss {result.loss}, gradient norm {result.grad_norm}")
        if not math.isfinite(evaluated):
            raise diverged(state.step, f"loss {result.loss:.4g}, validation loss {evaluated}")
        if result.is_skipped and result.loss_scale <= MIN_LOSS_SCALE:
            raise diverged(
                state.step, f"gradients overflow fp16 at the smallest loss scale, {result.loss_scale:g}"
            )
        if not result.is_skipped and not math.isfinite(result.grad_norm):
            raise diverged(state.step, f"loss {result.loss:.4g}, gradient norm {result.grad_norm}")


def diverged(step: int, how: str) -> UserError:
    """The one message for a run that has diverged."""
    return UserError(
        f"step {step} diverged ({how}): it is not saved, and earlier checkpoints are as they were; resume with a lower"
        " optim.lr, a longer optim.warmup_steps or optim.clip=1, and if it diverges again at once, move the newest"
        " checkpoint away"
    )


class RunSaver(Protocol):
    """What the hooks need to save the run."""

    def reserve(self) -> None:
        """Take the memory that saving needs."""

    def save(self, state: TrainState) -> None:
        """Save, perhaps while training goes on."""

    def save_now(self, state: TrainState) -> None:
        """Have this step saved on return."""

    def finish(self) -> None:
        """Wait for a save that is under way."""


class CheckpointHook(Hook):
    """Saves every `interval` steps and after the last."""

    def __init__(self, saver: RunSaver, *, interval: int, last_step: int) -> None:
        self._saver = saver
        self._interval = interval
        self._last_step = last_step

    def start(self, state: TrainState, run: RunView) -> None:
        """Take the memory that saving needs before any step is lost for the lack of it."""
        self._saver.reserve()

    def after_step(self, state: TrainState, report: StepReport) -> None:
        """Save when it is time; the run ends with the last step on the disk."""
        if state.step == self._last_step:
            self._saver.save_now(state)
        elif self._interval > 0 and state.step % self._interval == 0:
            self._saver.save(state)

    def finish(self, state: TrainState) -> None:
        """Complete a save that is under way, also when a step failed."""
        self._saver.finish()


class StopHook(Hook):
    """Ends the run early after a request (a signal), with a checkpoint; all ranks agree on the step."""

    def __init__(self, is_requested: Callable[[], bool], saver: RunSaver) -> None:
        self._is_requested = is_requested
        self._saver = saver

    def after_step(self, state: TrainState, report: StepReport) -> None:
        """Save and raise `StopTraining` once any rank was asked to stop."""
        if self._is_requested():
            self._saver.save_now(state)
            raise StopTraining


class StopTraining(Exception):
    """The run ends here as asked; it can be resumed."""
