"""What the ranks of these tests run: each function is called on every rank of a fresh gloo group."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megallama.checkpoint.distributed import storage, store
from megallama.checkpoint.distributed.background import BackgroundSaver
from megallama.checkpoint.format import protocol
from megallama.checkpoint.format.boxes import BoxedTensor
from megallama.checkpoint.format.disk import LOCAL_DISK, Disk
from megallama.checkpoint.format.integrity import latest_checkpoint
from megallama.checkpoint.format.record import INDEX_FILE, MANIFEST_FILE
from tests.checkpoint.synthetic import MODEL, STATE, Layout, boxes_of, wrong_elements


def save(
    directory: Path,
    layout: Layout,
    step: int,
    keep: int = 0,
    seed: int = 0,
    keep_every: int = 0,
    verified: set[int] | None = None,
    disk: Disk = LOCAL_DISK,
) -> Path:
    """Saves the synthetic state; also without process group."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    boxes = boxes_of(layout, rank, seed=seed)
    return store.save_checkpoint(
        directory,
        step=step,
        tensors=boxes,
        state=STATE,
        model=MODEL,
        keep=keep,
        keep_every=keep_every,
        verified=verified,
        disk=disk,
    )


def load(path: Path, layout: Layout, seed: int = 0) -> tuple[int, dict[str, Any]]:
    """Number of wrong elements after loading into boxes full of NaN, and the state."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    boxes = boxes_of(layout, rank, seed=None, cap=None)
    state = store.load_checkpoint(path, tensors=boxes, model=MODEL)
    return wrong_elements(boxes, seed=seed), state


def save_on_rank(directory: Path, layout: Layout, step: int) -> str:
    """`save` on gloo ranks."""
    dist.init_process_group("gloo")
    return str(save(directory, layout, step))


def save_keeping_two(directory: Path, layout: Layout) -> set[int]:
    """Saves steps 1 to 3 on gloo ranks; the steps that were read back."""
    dist.init_process_group("gloo")
    verified: set[int] = set()
    for step in (1, 2, 3):
        save(directory, layout, step, keep=2, verified=verified)
    return verified


def load_on_rank(path: Path, layout: Layout, seed: int = 0) -> tuple[int, dict[str, Any]]:
    """`load` on gloo ranks."""
    dist.init_process_group("gloo")
    return load(path, layout, seed=seed)


def train_while_saving(directory: Path, layout: Layout) -> tuple[list[int], int]:
    """Saves steps 1 to 3 with a disk that waits for 20 all-reduces: the steps saved, the all-reduces meanwhile."""
    dist.init_process_group("gloo")
    disk = WaitingDisk()
    saver = BackgroundSaver(directory, model=MODEL, keep=0, group=dist.new_group(backend="gloo"), disk=disk)
    trained = disk.may_write
    steps, sums = [], 0
    for step in (1, 2, 3):
        trained.clear()
        boxes = boxes_of(layout, dist.get_rank(), seed=step)
        saver.start(step=step, tensors=boxes, state=STATE)
        for _ in range(20):
            number = torch.ones(1)
            dist.all_reduce(number)
            sums += int(saver.is_running)
            assert number.item() == dist.get_world_size()
        for tensor in boxes.values():
            for view in tensor.boxes.values():
                view.zero_()
        trained.set()
        outcome = saver.wait()
        assert outcome is not None and outcome.problem is None, outcome
        steps.append(outcome.step)
    return steps, sums


def fill_up_in_background(directory: Path, layout: Layout) -> list[str | None]:
    """Saves three times; the disk of the last rank is full the second time. How each save ended."""
    dist.init_process_group("gloo")
    disk = FailingDisk()
    saver = BackgroundSaver(directory, model=MODEL, keep=0, group=dist.new_group(backend="gloo"), disk=disk)
    problems = []
    for step in (1, 2, 3):
        is_full = step == 2 and dist.get_rank() == dist.get_world_size() - 1
        disk.remaining_calls = 0 if is_full else None
        saver.start(step=step, tensors=boxes_of(layout, dist.get_rank()), state=STATE)
        outcome = saver.wait()
        assert outcome is not None
        problems.append(outcome.problem)
    return problems


def grown_bytes_in_background(directory: Path, size_bytes: int) -> tuple[int, int]:
    """What this process grew by, at most: once the memory for the copy was reserved, and after two saves."""
    whole = torch.ones(size_bytes // (8 << 20), 2 << 20)
    boxes = {(row, 0): whole[row : row + 1] for row in range(whole.shape[0])}
    tensors = {"fp32/w": BoxedTensor("fp32/w", tuple(whole.shape), torch.float32, True, boxes)}
    saver = BackgroundSaver(directory, model=MODEL, keep=1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is not ours
    before = _peak_bytes()
    saver.reserve(tensors)
    reserved = _peak_bytes()
    for step in (1, 2):
        saver.start(step=step, tensors=tensors, state=STATE)
        assert saver.wait() is not None
    return reserved - before, _peak_bytes() - before


def _peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def latest_on_rank(directory: Path) -> tuple[str, list[str]]:
    """`latest_checkpoint` and what it logged."""
    dist.init_process_group("gloo")
    lines: list[str] = []
    return str(latest_checkpoint(directory, log=lines.append)), lines


def save_on_subgroup(directory: Path) -> tuple[str, int]:
    """Ranks 1 and 2 of three save and load in a group of their own."""
    dist.init_process_group("gloo")
    group = dist.new_group([1, 2], backend="gloo")
    if dist.get_rank() == 0:
        dist.barrier()  # it hosts the store of the others
        return "", 0
    layout, rank = Layout(tp=2, dp=1), dist.get_rank() - 1
    boxes = boxes_of(layout, rank)
    path = store.save_checkpoint(
        directory, step=1, tensors=boxes, state=STATE, model=MODEL, keep=0, group=group
    )
    empty = boxes_of(layout, rank, seed=None)
    store.load_checkpoint(path, tensors=empty, model=MODEL, group=group)
    dist.barrier()
    return str(path), wrong_elements(empty)


def full_disk_on_rank(directory: Path, layout: Layout, full_rank: int) -> tuple[str, str]:
    """Saves while the disk of one rank fills up in the middle of its file: (type, text) of the error."""
    dist.init_process_group("gloo")
    storage.WRITE_BYTES = 4096
    disk = FailingDisk(5 if dist.get_rank() == full_rank else None)
    return error_of(lambda: save(directory, layout, 2, disk=disk))


def full_disk_for_index(directory: Path, layout: Layout) -> tuple[str, str]:
    """Saves while the disk has no room left for the index, which rank 0 writes."""
    dist.init_process_group("gloo")
    disk = FailingDisk(0, only=INDEX_FILE)
    return error_of(lambda: save(directory, layout, 2, disk=disk))


def broken_tensor_on_rank(directory: Path, layout: Layout) -> tuple[str, str]:
    """Saves while one rank cannot deliver a tensor, for a reason whose exception cannot be pickled."""
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:

        class LocalError(Exception):
            pass

        def fail(*_: Any) -> None:
            raise LocalError("device is gone")

        storage.DataFile.append = fail  # type: ignore[assignment, method-assign]
    return error_of(lambda: save(directory, layout, 2))


def load_of_another_model(path: Path, layout: Layout, model: dict[str, Any]) -> tuple[str, str]:
    """Loads with other model facts on the last rank only: all must hear of it."""
    dist.init_process_group("gloo")
    facts = model if dist.get_rank() == dist.get_world_size() - 1 else MODEL
    boxes = boxes_of(layout, dist.get_rank(), seed=None)
    return error_of(lambda: store.load_checkpoint(path, tensors=boxes, model=facts))


def die_while_saving(directory: Path, layout: Layout, step: int, moment: str, keep: int = 0) -> None:
    """Saves and dies of SIGKILL at `moment` on the last rank (which is rank 0 in a single process)."""
    if "RANK" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    disk = LOCAL_DISK
    if not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1:
        storage.WRITE_BYTES = 4096
        disk = DISKS.get(moment, LOCAL_DISK)
        if disk is LOCAL_DISK:
            _arm(moment)
    save(directory, layout, step, keep=keep, seed=1, disk=disk)


MOMENTS = (
    "before the first byte",
    "within a data file",
    "before the index",
    "within the index",
    "before the manifest",
    "within the manifest",
    "before the rename",
)


def _arm(moment: str) -> None:
    """Dies at a moment that is not one of writing."""
    place, name, value = {
        "before the rename": (store, "publish", _die),
        "between the renames": (protocol, "os", _DiesAtSecondReplace()),
        "within the removal of old ones": (protocol.shutil, "rmtree", _dies_in_removal),  # type: ignore[attr-defined]
    }[moment]
    setattr(place, name, value)


class WaitingDisk(Disk):
    """Writes nothing until it may."""

    def __init__(self) -> None:
        self.may_write = threading.Event()

    def write(self, fd: int, data: memoryview) -> None:
        assert self.may_write.wait(1800)
        super().write(fd, data)


class FailingDisk(Disk):
    """Writes so many times, then fails; None: never. `only` is the name of the file that counts, "" any.

    `is_deadly`: it ends the process; `is_halfway`: it writes half of the data before.
    """

    def __init__(
        self,
        remaining_calls: int | None = None,
        *,
        only: str = "",
        is_deadly: bool = False,
        is_halfway: bool = False,
    ) -> None:
        self.remaining_calls = remaining_calls
        self._only = only
        self._is_deadly = is_deadly
        self._is_halfway = is_halfway

    def write(self, fd: int, data: memoryview) -> None:
        if self.remaining_calls is not None and self._counts(fd):
            self.remaining_calls -= 1
            if self.remaining_calls < 0:
                self._fail(fd, data)
        super().write(fd, data)

    def _counts(self, fd: int) -> bool:
        return not self._only or os.readlink(f"/proc/self/fd/{fd}").endswith(f"/{self._only}")

    def _fail(self, fd: int, data: memoryview) -> None:
        if self._is_halfway:
            super().write(fd, data[: len(data) // 2])
        if self._is_deadly:
            _die()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


DISKS: dict[str, Disk] = {
    "before the first byte": FailingDisk(0, is_deadly=True),
    "within a data file": FailingDisk(7, is_deadly=True),
    "before the index": FailingDisk(0, only=INDEX_FILE, is_deadly=True),
    "within the index": FailingDisk(0, only=INDEX_FILE, is_deadly=True, is_halfway=True),
    "before the manifest": FailingDisk(0, only=MANIFEST_FILE, is_deadly=True),
    "within the manifest": FailingDisk(0, only=MANIFEST_FILE, is_deadly=True, is_halfway=True),
}
"""Disks that end the process at a moment of writing."""


class _DiesAtSecondReplace:
    path = os.path

    def __init__(self) -> None:
        self.calls = 0

    def replace(self, source: Path, target: Path) -> None:
        self.calls += 1
        if self.calls == 2:
            _die()
        os.replace(source, target)


def _dies_in_removal(path: Path, ignore_errors: bool = False) -> None:
    next(file for file in path.iterdir() if file.suffix == ".bin").unlink()
    _die()


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def error_of(function: Callable[[], object]) -> tuple[str, str]:
    """Type and text of the error of `function`."""
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "no error"
