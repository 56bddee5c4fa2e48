"""Saving while training goes on: what is saved, what it costs in memory, and what happens when it fails."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megallama.checkpoint.distributed.background import BackgroundSaver
from megallama.checkpoint.distributed.staging import Staging
from megallama.checkpoint.format.boxes import BoxedTensor
from megallama.checkpoint.format.disk import LOCAL_DISK, Disk
from megallama.checkpoint.format.integrity import verify_checkpoint
from megallama.checkpoint.format.protocol import find_checkpoints
from megallama.host.errors import CheckpointError, UserError
from tests.checkpoint.ranks_at_work import (
    WaitingDisk,
    fill_up_in_background,
    grown_bytes_in_background,
    load,
    load_on_rank,
    train_while_saving,
)
from tests.checkpoint.synthetic import MODEL, STATE, Layout, boxes_of
from tests.support.ranks import run_ranks

ONE = Layout(1, 1)


def saver_of(directory: Path, *, keep: int = 0, disk: Disk = LOCAL_DISK) -> BackgroundSaver:
    return BackgroundSaver(directory, model=MODEL, keep=keep, disk=disk)


def test_what_is_saved_is_the_state_of_the_call(tmp_path: Path) -> None:
    disk = WaitingDisk()
    saver, boxes = saver_of(tmp_path, disk=disk), boxes_of(ONE, 0)
    saver.start(step=5, tensors=boxes, state=STATE)
    assert saver.is_running and find_checkpoints(tmp_path) == []
    for tensor in boxes.values():
        for view in tensor.boxes.values():
            view.fill_(math.nan)
    disk.may_write.set()
    outcome = saver.wait()
    assert outcome is not None and (outcome.step, outcome.problem) == (5, None) and outcome.seconds > 0
    assert not saver.is_running and saver.wait() is None
    assert verify_checkpoint(tmp_path / "step-00000005") == []
    assert load(tmp_path / "step-00000005", ONE) == (0, STATE)


def test_ranks_talk_of_other_things_meanwhile(tmp_path: Path) -> None:
    layout = Layout(1, 2)
    results = run_ranks(2, train_while_saving, tmp_path, layout)
    assert [steps for steps, _ in results] == [[1, 2, 3]] * 2
    assert all(sums == 60 for _, sums in results), "every all-reduce ended while a save was under way"
    for step in (1, 2, 3):
        loaded = run_ranks(2, load_on_rank, tmp_path / f"step-{step:08d}", layout, step)
        assert loaded == [(0, STATE)] * 2


def test_a_full_disk_is_an_outcome_on_every_rank(tmp_path: Path) -> None:
    results = run_ranks(2, fill_up_in_background, tmp_path, Layout(1, 2))
    for problems in results:
        assert problems[0] is None and problems[2] is None
        assert "rank-00001.bin (No space left on device; " in str(problems[1])
    assert find_checkpoints(tmp_path) == [1, 3]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert all(verify_checkpoint(tmp_path / f"step-{step:08d}") == [] for step in (1, 3))


def test_a_fault_of_the_program_is_raised(tmp_path: Path) -> None:
    part = BoxedTensor("fp32/a", (4, 2), torch.float32, True, {(0, 0): torch.ones(3, 2)})
    saver = saver_of(tmp_path)
    saver.start(step=1, tensors={"fp32/a": part}, state={})
    with pytest.raises(CheckpointError, match="fp32/a: boxes hold 6 of 8"):
        saver.wait()
    assert saver.wait() is None


def test_saves_do_not_overtake_each_other(tmp_path: Path) -> None:
    disk = WaitingDisk()
    saver = saver_of(tmp_path, disk=disk)
    saver.start(step=1, tensors=boxes_of(ONE, 0), state=STATE)
    for again in (saver.start, saver.save_now):
        with pytest.raises(AssertionError, match="wait"):
            again(step=2, tensors=boxes_of(ONE, 0), state=STATE)
    disk.may_write.set()
    assert saver.wait() is not None
    assert find_checkpoints(tmp_path) == [1]


def test_the_copy_takes_this_ranks_part_once(monkeypatch: pytest.MonkeyPatch) -> None:
    staging, boxes = Staging(), boxes_of(Layout(1, 2, False), 0)
    sizes = [view.nbytes for tensor in boxes.values() for view in tensor.boxes.values()]
    staging.reserve(boxes)
    padded = sum(-(-size // 64) * 64 for size in sizes)
    assert staging.size_bytes == padded
    places = []
    for _ in range(2):
        staged = staging.copy(boxes)
        places.append(min(view.data_ptr() for t in staged.values() for view in t.boxes.values()))
        for key, tensor in boxes.items():
            for offset, view in tensor.boxes.items():
                assert torch.equal(staged[key].boxes[offset], view)
                assert staged[key].boxes[offset].data_ptr() != view.data_ptr()
    assert staging.size_bytes == padded and places[0] == places[1]
    assert Staging().copy(boxes_of(Layout(1, 2, False), 1)) == {}, "a replica writes nothing"

    def lack(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "zeros", lack)
    with pytest.raises(UserError, match=rf"\({padded} bytes on this rank\).*checkpoint.async_save=false"):
        Staging().reserve(boxes)


@pytest.mark.parametrize("is_refused", [False, True])
def test_memory_for_a_gpu_is_locked_in_its_size_and_let_go(
    monkeypatch: pytest.MonkeyPatch, is_refused: bool
) -> None:
    calls: list[tuple[str, int]] = []

    def register(address: int, size: int, flags: int) -> int:
        calls.append(("lock", size))
        return int(is_refused)

    runtime = SimpleNamespace(
        cudaHostRegister=register,
        cudaHostUnregister=lambda address: calls.append(("unlock", address)),
        cudaError=SimpleNamespace(success=0),
    )
    waited: list[str] = []
    stream = SimpleNamespace(synchronize=lambda: waited.append("stream"))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr("megallama.checkpoint.distributed.staging._is_on_gpu", lambda tensor: True)
    staging = Staging()
    staging.copy(boxes_of(Layout(1, 2, False), 0))
    size, address = staging.size_bytes, staging._memory.data_ptr()
    assert calls == [("lock", size)] and waited == ["stream"]
    del staging
    assert calls[1:] == ([] if is_refused else [("unlock", address)])


def test_the_process_grows_by_one_copy_and_no_more(tmp_path: Path) -> None:
    size = 96 << 20
    ((reserved, saved),) = run_ranks(1, grown_bytes_in_background, tmp_path, size)
    assert reserved == pytest.approx(size, rel=0.05)
    assert saved - reserved < 48 << 20, "blocks on their way to the disk, not another copy"
