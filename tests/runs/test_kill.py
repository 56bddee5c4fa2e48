"""kill -9 at fifty random instants: each resume stands on an intact checkpoint, and the losses go on bit for bit."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megallama.checkpoint.format.integrity import verify_checkpoint
from megallama.checkpoint.format.protocol import find_checkpoints, step_name
from megallama.metrics.jsonl import load_metrics
from megallama.trainer.hooks.base import Hook, StepReport, StopTraining
from megallama.trainer.state import TrainState
from tests.support.jobs import overrides, train
from tests.support.ranks import run_ranks

INTERVAL = 2
SAVE_S = 0.3
"""What the slowed writer takes for the data of one save; two steps take less."""
MOST_STEPS = 400
"""More than all lives of a run can take: each is killed soon."""


@dataclass(frozen=True)
class Death:
    """When a rank dies: so long after so many saves began (0: after the first step)."""

    rank: int
    saves: int
    delay_s: float


def random_deaths(seed: int, *, count: int, world_size: int) -> list[Death]:
    """Two of three within or after the first or second save, the others wherever the run is by then."""
    draw = random.Random(seed)
    deaths = []
    for _ in range(count):
        saves = draw.choice((0, 1, 2))
        deaths.append(Death(draw.randrange(world_size), saves, draw.uniform(0, 1.2 * SAVE_S)))
    return deaths


def train_to_death(arguments: list[str], death: Death) -> None:
    """One rank of a run with a slow disk, which dies as `death` says."""
    from megallama.checkpoint.distributed import storage
    from megallama.trainer.saver import Saver

    write_all, save = storage.write_all, Saver.save
    storage.WRITE_BYTES = 256 * 1024
    armed = [threading.Event() for _ in range(3)]
    begun = [0]

    def slow_write(fd: int, data: memoryview) -> None:
        time.sleep(SAVE_S * len(data) / (3 << 20) * int(os.environ["WORLD_SIZE"]))
        write_all(fd, data)

    def noted_save(self: Saver, state: Any) -> None:
        save(self, state)
        begun[0] += 1
        if begun[0] < len(armed):
            armed[begun[0]].set()

    class NoteStep(Hook):
        def after_step(self, state: TrainState, report: StepReport) -> None:
            armed[0].set()

    def die() -> None:
        armed[death.saves].wait()
        time.sleep(death.delay_s)
        os.kill(os.getpid(), signal.SIGKILL)

    storage.write_all, Saver.save = slow_write, noted_save  # type: ignore[assignment, method-assign]
    if int(os.environ["RANK"]) == death.rank:
        threading.Thread(target=die, daemon=True).start()
    train(arguments, hooks=[NoteStep()])


def train_until(arguments: list[str], step: int) -> None:
    """Train up to `step` of a longer run, without a checkpoint; the step after it is not recorded."""

    class Stop(Hook):
        def after_step(self, state: TrainState, report: StepReport) -> None:
            if state.step > step:
                raise StopTraining

    train(arguments, hooks=[Stop()])


def losses(run_dir: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    lines = load_metrics(run_dir / "metrics.jsonl")
    assert [line["progress/step"] for line in lines] == list(range(1, len(lines) + 1)), "each step once"
    return [(line["train/loss"], line["train/grad_norm"]) for line in lines]


def resumes(run_dir: Path) -> list[int]:
    """The steps at which the lives of a run began, but for the first."""
    log = (run_dir / "log" / "rank-00000.log").read_text(encoding="utf-8")
    assert "damaged" not in log
    return [int(step) for step in re.findall(r"resumed from .* at step (\d+)$", log, flags=re.M)]


def train_to_a_signal(arguments: list[str]) -> None:
    """One rank of a run that is asked to stop before the first byte of its first save is written."""
    from megallama.checkpoint.distributed import storage
    from megallama.trainer.saver import Saver

    write_all, save, is_asked = storage.write_all, Saver.save, threading.Event()

    def wait_and_write(fd: int, data: memoryview) -> None:
        is_asked.wait()
        write_all(fd, data)

    def save_and_signal(self: Saver, state: Any) -> None:
        save(self, state)
        assert self._background.is_running
        signal.raise_signal(signal.SIGTERM)
        is_asked.set()

    storage.write_all, Saver.save = wait_and_write, save_and_signal  # type: ignore[assignment, method-assign]
    train(arguments)


def test_a_signal_within_a_save_completes_it(tmp_path: Path) -> None:
    arguments = overrides(tmp_path, "checkpoint.interval=3", run_name="asked")
    run_ranks(2, train_to_a_signal, arguments)
    folder = tmp_path / "asked" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == [step_name(3)]
    assert verify_checkpoint(folder / step_name(3)) == []
    assert len(losses(tmp_path / "asked")) == 3


def train_to_two_signals(arguments: list[str], said: Path) -> None:
    """A run whose disk hangs at its second save: asked to stop, and again while that save is waited for."""
    from megallama.checkpoint.distributed import storage
    from megallama.checkpoint.distributed.background import BackgroundSaver
    from megallama.trainer import build
    from megallama.trainer.saver import Saver

    build.SAME_REQUEST_S = 0.0
    write_all, save, wait = storage.write_all, Saver.save, BackgroundSaver.wait
    hangs, never = threading.Event(), threading.Event()

    def write(fd: int, data: memoryview) -> None:
        if hangs.is_set():
            never.wait()
        write_all(fd, data)

    def save_and_signal(self: Saver, state: Any) -> None:
        if state.step == 4:
            self.finish()
            hangs.set()
        save(self, state)
        if state.step == 4:
            signal.raise_signal(signal.SIGINT)

    def wait_and_be_asked_again(self: BackgroundSaver) -> Any:
        if hangs.is_set() and self.is_running:
            threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)).start()
        return wait(self)

    storage.write_all, Saver.save = write, save_and_signal  # type: ignore[assignment, method-assign]
    BackgroundSaver.wait = wait_and_be_asked_again  # type: ignore[method-assign]
    with said.open("wb") as file:
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    train(arguments)


def test_a_second_ctrl_c_ends_at_once_and_costs_no_checkpoint(tmp_path: Path) -> None:
    arguments = overrides(tmp_path, "checkpoint.interval=2", run_name="asked")
    with pytest.raises(AssertionError, match="exit code 130|without a result"):
        run_ranks(1, train_to_two_signals, arguments, tmp_path / "said")
    folder = tmp_path / "asked" / "checkpoints"
    assert find_checkpoints(folder) == [2] and verify_checkpoint(folder / step_name(2)) == []
    lines = (tmp_path / "said").read_text(encoding="utf-8").splitlines()
    ours = [line for line in lines if "asked to stop" in line]
    assert ours[1:] == [
        "WARNING: asked to stop again: ended at once, without the last save; older checkpoints are untouched"
    ]
    assert not any("Traceback" in line for line in lines), lines
    run_ranks(1, train, arguments)
    assert resumes(tmp_path / "asked") == [2] and len(losses(tmp_path / "asked")) == 5


@pytest.mark.long
@pytest.mark.parametrize(
    ("world_size", "layout", "count"),
    [(1, [], 30), (2, ["zero.stage=2", "precision.dtype=bf16"], 20)],
    ids=["one rank", "dp2 zero2 bf16"],
)
def test_killed_at_random_instants(world_size: int, layout: list[str], count: int, tmp_path: Path) -> None:
    arguments = overrides(
        tmp_path,
        *layout,
        f"train.steps={MOST_STEPS}",
        f"checkpoint.interval={INTERVAL}",
        "checkpoint.keep_every=10",
        run_name="killed",
    )
    folder = tmp_path / "killed" / "checkpoints"
    wanted: list[int] = []
    within_a_save = 0
    for death in random_deaths(17, count=count, world_size=world_size):
        with pytest.raises(AssertionError, match="ended without a result|failed"):
            run_ranks(world_size, train_to_death, arguments, death)
        steps = find_checkpoints(folder)
        for step in steps:
            assert verify_checkpoint(folder / step_name(step)) == [], (death, step)
        within_a_save += any(path.name.startswith(".tmp-") for path in folder.iterdir())
        completed = len(losses(tmp_path / "killed"))
        last_due = completed // INTERVAL * INTERVAL
        newest = max(steps, default=0)
        # The step that was due last may be lost, and with it those since.
        assert newest >= last_due - INTERVAL, (death, completed, steps)
        if newest:
            wanted.append(newest)
        assert resumes(tmp_path / "killed") == wanted[: len(wanted) - bool(newest)]
    assert within_a_save >= count // 5, "too few died within a save to show anything"
    got = losses(tmp_path / "killed")
    whole = [word for word in arguments if not word.startswith(("train.run_dir", "checkpoint."))]
    run_ranks(
        world_size,
        train_until,
        [*whole, f"train.run_dir={tmp_path / 'whole'}", "checkpoint.interval=0"],
        len(got),
    )
    assert got == losses(tmp_path / "whole")[: len(got)]
    print(f"{count} deaths, {within_a_save} within a save, {len(got)} steps, resumed at {wanted}")
