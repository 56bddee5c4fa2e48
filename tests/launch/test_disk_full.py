"""A disk that fills up while a run is saving: one message, the older checkpoint whole, the rerun goes on from it."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest

from megallama.checkpoint.format.disk import Disk
from megallama.checkpoint.format.integrity import verify_checkpoint
from megallama.host.errors import EXIT_USER_ERROR
from megallama.metrics.jsonl import load_metrics
from megallama.trainer.hooks.base import Hook, StepReport
from megallama.trainer.state import TrainState
from tests.launch.entry import Outcome, call, impatient_train_command
from tests.support.jobs import metrics, overrides, run_job, wait_for_save
from tests.support.ranks import run_ranks

SAVES = "checkpoint.interval=2"
"""Of 5 steps: saves after 2 and 4 steps and at the end."""

DISK_BYTES = 16 << 20
FREE_BYTES = 1 << 20
"""Less than one checkpoint of about 3 MB."""

_CLONE_NEWNS, _CLONE_NEWUSER, _MS_REC, _MS_PRIVATE = 0x20000, 0x10000000, 0x4000, 0x40000


class AtSteps(Hook):
    """Calls an action when so many steps are done and not yet saved."""

    def __init__(self, actions: Mapping[int, Callable[[], object]]) -> None:
        self._actions = actions

    def after_step(self, state: TrainState, report: StepReport) -> None:
        if state.step in self._actions:
            self._actions[state.step]()


class ClaimedDisk(Disk):
    """Says that it has more room than is there."""

    def __init__(self, claimed_bytes: int | None) -> None:
        self._claimed_bytes = claimed_bytes

    def free_bytes(self, path: Path) -> int:
        return super().free_bytes(path) if self._claimed_bytes is None else self._claimed_bytes


def limit_files() -> None:
    """No file of this process may grow any more than logs do: writing fails half-way, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, resource.RLIM_INFINITY))


def limited_on_last_rank(arguments: list[str]) -> Outcome:
    """One of two ranks; the other one's disk is full before the second save."""
    hooks = [AtSteps({3: limit_files})] if os.environ["RANK"] == "1" else []
    return call(impatient_train_command, arguments, hooks)


def run_with_short_metrics(arguments: list[str]) -> Outcome:
    """A run whose metrics.jsonl can take no line after about ten steps."""
    limit = (4096, resource.RLIM_INFINITY)
    hook = AtSteps({3: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)})
    return call(impatient_train_command, arguments, [hook])


def test_a_disk_without_room_for_metrics(tmp_path: Path) -> None:
    arguments = overrides(tmp_path, "train.steps=60", "log.interval=60")
    (outcome,) = run_ranks(1, run_with_short_metrics, arguments)
    assert outcome.code == EXIT_USER_ERROR and "Traceback" not in outcome.output, outcome.output
    assert len(outcome.errors) == 1, outcome.output
    assert outcome.errors[0].startswith(
        f"error: metrics cannot be written to {tmp_path / 'run'} (File too large)"
    )
    steps = [line["progress/step"] for line in load_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and 3 < len(steps) < 60, "all but the last line are whole"


def assert_first_is_whole(checkpoints: Path) -> None:
    """The checkpoint of step 2 and nothing else."""
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000002"]
    assert verify_checkpoint(checkpoints / "step-00000002") == []


def full_for_a_while(arguments: list[str]) -> Outcome:
    """A run whose disk is full at its second save and has room again at the third."""

    def lift() -> None:
        wait_for_save()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    return call(impatient_train_command, arguments, [AtSteps({3: limit_files, 6: lift})])


def test_training_goes_on_after_a_failed_background_save(tmp_path: Path) -> None:
    wanted = run_job(tmp_path, 1, "train.steps=7", run_name="whole")
    arguments = overrides(tmp_path, SAVES, "train.steps=7", "checkpoint.keep=0", run_name="cut")
    (outcome,) = run_ranks(1, full_for_a_while, arguments)
    assert outcome.code == 0 and "Traceback" not in outcome.output, outcome.output
    (line,) = (line for line in outcome.output.splitlines() if "not saved" in line)
    assert line.startswith("WARNING: step 4 was not saved, training goes on: no room for the checkpoint at ")
    assert (
        "free some space, lower checkpoint.keep or move train.run_dir; older checkpoints are untouched"
        in line
    )
    lines = metrics(tmp_path / "cut")
    assert [entry["checkpoint/failures"] for entry in lines if "checkpoint/failures" in entry] == [1]
    assert [(entry["train/loss"], entry["train/grad_norm"]) for entry in lines] == wanted
    folder = tmp_path / "cut" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [f"step-0000000{step}" for step in (2, 6, 7)]
    assert all(verify_checkpoint(path) == [] for path in folder.iterdir())


@pytest.mark.parametrize("async_save", ["true", "false"])
def test_a_disk_that_is_full_for_one_rank_ends_all(async_save: str, tmp_path: Path) -> None:
    wanted = run_job(tmp_path, 2, SAVES, run_name="whole")
    arguments = overrides(tmp_path, SAVES, f"checkpoint.async_save={async_save}", run_name="cut")
    first, second = run_ranks(2, limited_on_last_rank, arguments)
    assert (first.code, second.code) == (EXIT_USER_ERROR, EXIT_USER_ERROR), (first, second)
    assert first.errors[0].startswith("error: no room for the checkpoint at "), first.output
    assert second.errors[0] == first.errors[0].replace("error:", "error on rank 1:"), second.output
    for outcome in (first, second):
        assert len(outcome.errors) == 1 and "Traceback" not in outcome.output, outcome.output
    assert "free some space, lower checkpoint.keep or move train.run_dir" in first.output
    # The last step must be saved: in the background mode, step 4 was tried before.
    assert first.output.count("step 4 was not saved, training goes on") == (async_save == "true")
    assert_first_is_whole(tmp_path / "cut" / "checkpoints")
    assert run_job(tmp_path, 2, SAVES, run_name="cut") == wanted
    log = (tmp_path / "cut" / "log" / "rank-00000.log").read_text()
    assert "step-00000002 at step 2" in log


def mount_small_disk(folder: Path) -> bool:
    """Puts a disk of DISK_BYTES at `folder` that only this process sees; False where the kernel forbids it."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _CLONE_NEWNS
    user, group = os.getuid(), os.getgid()
    if user != 0:
        flags |= _CLONE_NEWUSER
    if libc.unshare(flags) != 0:
        return False
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) != 0:
        return False
    size = f"size={DISK_BYTES}".encode()
    return bool(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, size) == 0)


def fill(folder: Path, *, leave_bytes: int) -> None:
    """Writes a file that leaves `leave_bytes` of the disk."""
    disk = os.statvfs(folder)
    assert disk.f_blocks * disk.f_frsize == DISK_BYTES, "never the disk of this machine"
    free = disk.f_bavail * disk.f_frsize
    with open(folder / "ballast", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - leave_bytes)


def run_on_small_disk(
    disk: Path, arguments: list[str], leave_bytes: int, is_noticed_late: bool
) -> tuple[Outcome, list[str], list[str], Outcome, list[tuple[float, float]]]:
    """A run whose disk fills up after step 3, and its rerun with space.

    Returns:
        How it ended, its checkpoints, what is wrong with the first of them, how the rerun ended, its losses.
    """
    # A container may forbid mounts; then the limit on files stands for the full disk.
    is_mounted = mount_small_disk(disk)
    act = partial(fill, disk, leave_bytes=leave_bytes) if is_mounted else limit_files
    # As where a quota, or another writer, takes what the file system says is free.
    claimed = 1 << 50 if is_noticed_late else None
    ended = call(impatient_train_command, arguments, [AtSteps({3: act})], ClaimedDisk(claimed))
    saved = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
    problems = verify_checkpoint(disk / "run" / "checkpoints" / "step-00000002")
    (disk / "ballast").unlink(missing_ok=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    again = call(impatient_train_command, arguments)
    lines = metrics(disk / "run")
    return ended, saved, problems, again, [(line["train/loss"], line["train/grad_norm"]) for line in lines]


@pytest.mark.parametrize(
    ("leave_bytes", "is_noticed_late"),
    [(FREE_BYTES, False), (FREE_BYTES, True), (0, True)],
    ids=["too little before the save", "too little within the save", "nothing at all"],
)
def test_a_small_disk(leave_bytes: int, is_noticed_late: bool, tmp_path: Path) -> None:
    wanted = run_job(tmp_path, 1, SAVES, run_name="whole")
    disk = tmp_path / "disk"
    disk.mkdir()
    arguments = [*overrides(tmp_path, SAVES), f"train.run_dir={disk / 'run'}"]
    ((ended, saved, problems, again, got),) = run_ranks(
        1, run_on_small_disk, disk, arguments, leave_bytes, is_noticed_late
    )
    assert ended.code == EXIT_USER_ERROR and len(ended.errors) == 1, ended.output
    assert "Traceback" not in ended.output and "free some" in ended.errors[0], ended.output
    assert (saved, problems) == (["step-00000002"], []), ended.output
    assert again.code == 0, again.output
    assert got == wanted
