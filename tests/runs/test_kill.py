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

import pytest

from megallama.checkpoint.format.disk import Disk
from megallama.checkpoint.format.integrity import verify_checkpoint
from megallama.checkpoint.format.protocol import find_checkpoints, step_name
from megallama.metrics.jsonl import load_metrics
from megallama.trainer.build import SAME_REQUEST_S
from megallama.trainer.hooks.base import Hook, StepReport, StopTraining
from megallama.trainer.state import TrainState
from tests.support.jobs import overrides, train, wait_for_save
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


class SlowDisk(Disk):
    """Takes SAVE_S for the data of one save."""

    def write(self, fd: int, data: memoryview) -> None:
        time.sleep(SAVE_S * len(data) / (3 << 20) * int(os.environ["WORLD_SIZE"]))
        super().write(fd, data)


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

    storage.WRITE_BYTES = 256 * 1024
    armed = [threading.Event() for _ in range(3)]

    class NoteStep(Hook):
        """Called right before the save of a step that is due."""

        begun = 0

        def after_step(self, state: TrainState, report: StepReport) -> None:
            armed[0].set()
            self.begun += state.step % INTERVAL == 0
            if self.begun < len(armed):
                armed[self.begun].set()

    def die() -> None:
        armed[death.saves].wait()
        time.sleep(death.delay_s)
        os.kill(os.getpid(), signal.SIGKILL)

    if int(os.environ["RANK"]) == death.rank:
        threading.Thread(target=die, daemon=True).start()
    train(arguments, hooks=[NoteStep()], disk=SlowDisk())


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
    """One rank of a run that is asked to stop while its first save waits for the disk."""

    class Ask(Hook):
        def after_step(self, state: TrainState, report: StepReport) -> None:
            if state.step == 3:
                signal.raise_signal(signal.SIGTERM)

    train(arguments, hooks=[Ask()], disk=SlowDisk())


def test_a_signal_within_a_save_completes_it(tmp_path: Path) -> None:
    arguments = overrides(tmp_path, "checkpoint.interval=3", run_name="asked")
    run_ranks(2, train_to_a_signal, arguments)
    folder = tmp_path / "asked" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == [step_name(3)]
    assert verify_checkpoint(folder / step_name(3)) == []
    assert len(losses(tmp_path / "asked")) == 3


def train_to_two_signals(arguments: list[str], said: Path) -> None:
    """A run whose disk hangs at its second save: asked to stop, and again while that save is waited for."""
    hangs, never = threading.Event(), threading.Event()

    class HangingDisk(Disk):
        def write(self, fd: int, data: memoryview) -> None:
            if hangs.is_set():
                time.sleep(1.5 * SAME_REQUEST_S)
                os.kill(os.getpid(), signal.SIGINT)
                never.wait()
            super().write(fd, data)

    class Ask(Hook):
        def after_step(self, state: TrainState, report: StepReport) -> None:
            if state.step == 4:
                wait_for_save()
                hangs.set()
                signal.raise_signal(signal.SIGINT)

    with said.open("wb") as file:
        os.dup2(file.fileno(), 2)
    train(arguments, hooks=[Ask()], disk=HangingDisk())


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
        # At most two saves are lost: the one being written, and the one that waits for it.
        assert newest >= last_due - 2 * INTERVAL, (death, completed, steps)
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
