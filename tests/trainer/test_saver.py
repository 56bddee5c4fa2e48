"""When a run is saved and what a failed save means: with a fake background, so that time stands still."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch

from megallama.checkpoint.distributed.background import SaveOutcome
from megallama.checkpoint.format.boxes import BoxedTensor
from megallama.config.schema import CheckpointConfig, Dtype
from megallama.engine.step import StepResult
from megallama.host.errors import UserError
from megallama.trainer.finite import not_finite
from megallama.trainer.hooks.base import StepReport, diverged
from megallama.trainer.saver import Saver, SaveReportHook
from megallama.trainer.state import TrainState


class FakeBackground:
    """Saves when told to; `ends` has how."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.running: int | None = None
        self.is_running = False
        self.problems: dict[int, str] = {}

    def reserve(self, tensors: Any) -> None:
        self.events.append("reserve")

    def start(self, *, step: int, tensors: Any, state: Any) -> None:
        assert self.running is None
        self.events.append(("start", step, state["progress"]["step"]))
        self.running, self.is_running = step, True

    def wait(self) -> SaveOutcome | None:
        if self.running is None:
            return None
        step, self.running, self.is_running = self.running, None, False
        self.events.append(("end", step))
        return SaveOutcome(step, 1.5, self.problems.get(step))

    def save_now(self, *, step: int, tensors: Any, state: Any) -> None:
        assert self.running is None
        self.events.append(("now", step))
        if step in self.problems:
            raise UserError(self.problems[step])


def all_is_well(state: TrainState, tensors: Any) -> None:
    """Any state may be saved."""


def build(
    *, saved_step: int | None = None, check: Any = all_is_well, **settings: Any
) -> tuple[Saver, FakeBackground]:
    background = FakeBackground()
    saver = Saver(
        background,
        CheckpointConfig(interval=2, **settings),
        is_first=True,
        tensors=dict,
        check=check,
        describe=lambda state: {"progress": dict(state.to_json())},
        saved_step=saved_step,
    )
    return saver, background


def at(step: int) -> TrainState:
    return TrainState(step=step)


def test_a_save_that_is_due_waits_for_the_one_before(caplog: pytest.LogCaptureFixture) -> None:
    saver, background = build()
    for step in (2, 4, 6):
        saver.save(at(step))
    saver.finish()
    wanted = [("start", 2, 2), ("end", 2), ("start", 4, 4), ("end", 4), ("start", 6, 6), ("end", 6)]
    assert background.events == wanted
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == 1 and "longer than checkpoint.interval (2 steps)" in lines[0], "said once"


def test_the_end_of_the_run_is_on_the_disk() -> None:
    saver, background = build()
    saver.save(at(2))
    saver.save_now(at(3))
    saver.save_now(at(3))
    assert background.events == [("start", 2, 2), ("end", 2), ("now", 3)], "each step once"
    saver, background = build()
    saver.save(at(2))
    saver.save_now(at(2))
    assert background.events == [("start", 2, 2), ("end", 2)], "a stop at a step that is being saved"


def test_a_failed_save_is_told_once_and_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    saver, background = build()
    background.problems = {2: "no room for the checkpoint at X: free some space"}
    hook = SaveReportHook(saver)
    numbers = []
    for step in (1, 2, 3, 4, 5):
        report = StepReport(StepResult(1.0, 1.0, 0.1, 8, 1.0, False), seconds=0.1)
        hook.after_step(at(step), report)
        numbers.append({key: value for key, value in report.numbers.items() if not key.endswith("_ms")})
        if step % 2 == 0:
            saver.save(at(step))
            background.is_running = step == 4  # the first one ends at once
    assert numbers == [{}, {}, {"checkpoint/failures": 1}, {}, {}]
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert lines == [
        "step 2 was not saved, training goes on: no room for the checkpoint at X: free some space"
    ]
    saver.finish()
    assert saver.take_numbers()["checkpoint/save_s"] == 1.5


def test_a_step_whose_save_failed_is_saved_at_the_end() -> None:
    saver, background = build()
    background.problems = {4: "full"}
    saver.save(at(4))
    with pytest.raises(UserError, match="full"):
        saver.save_now(at(4))
    background.problems = {}
    saver.save_now(at(4))
    assert background.events == [("start", 4, 4), ("end", 4), ("now", 4), ("now", 4)]


def test_without_background_training_stands_still() -> None:
    saver, background = build(async_save=False)
    saver.reserve()
    saver.save(at(2))
    assert background.events == [("now", 2)]
    assert set(saver.take_numbers()) == {"checkpoint/stall_ms"}


def test_memory_is_taken_at_the_start() -> None:
    saver, background = build()
    saver.reserve()
    assert background.events == ["reserve"]


def test_what_was_resumed_from_is_not_saved_again() -> None:
    saver, background = build(saved_step=6)
    saver.save_now(at(6))
    assert background.events == []


@pytest.mark.parametrize("settings", [{}, {"async_save": False}])
def test_a_state_that_is_not_finite_is_not_saved(settings: dict[str, Any]) -> None:
    """So it takes the place of no older one: what is not saved removes nothing."""

    def check(state: TrainState, tensors: Any) -> None:
        raise diverged(state.step, "fp32/w holds inf")

    saver, background = build(check=check, **settings)
    for save in (saver.save, saver.save_now):
        with pytest.raises(UserError, match=r"step 2 diverged \(fp32/w holds inf\): it is not saved"):
            save(at(2))
    assert background.events == []


@pytest.mark.parametrize(
    ("key", "value", "dtype", "fault"),
    [
        ("fp32/w", math.nan, Dtype.bf16, "fp32/w holds nan"),
        ("fp32/w", -math.inf, Dtype.fp32, "fp32/w holds inf"),
        ("exp_avg_sq/w", math.inf, Dtype.fp16, "exp_avg_sq/w holds inf"),
        ("fp32/w", -1e5, Dtype.fp16, "fp32/w holds 1e+05, too large for the number format"),
        ("exp_avg/w", -1e5, Dtype.fp16, None),
        ("fp32/w", -1e5, Dtype.bf16, None),
    ],
)
def test_what_is_finite(key: str, value: float, dtype: Dtype, fault: str | None) -> None:
    """In its own format, and master weights also in the one of the model."""
    flat = torch.ones(7)
    flat[5] = value
    boxes = {(0,): flat[:3], (3,): flat[3:3], (4,): flat[3:]}
    tensor = BoxedTensor(key, (7,), torch.float32, True, boxes)
    tensors = {"exp_avg/other": BoxedTensor("exp_avg/other", (7,), torch.float32, True, {}), key: tensor}
    assert not_finite(tensors, dtype=dtype, group=None) == fault
