"""Replacement, and disks that are full or say no."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from megallama.checkpoint.distributed import store
from megallama.checkpoint.format.integrity import verify_checkpoint
from megallama.checkpoint.format.protocol import find_checkpoints
from megallama.host.errors import UserError
from tests.checkpoint.ranks_at_work import (
    broken_tensor_on_rank,
    full_disk_for_index,
    full_disk_on_rank,
    load,
    save,
    save_on_rank,
)
from tests.checkpoint.synthetic import STATE, Layout
from tests.support.ranks import run_ranks

ONE, TWO = Layout(1, 1), Layout(1, 2)


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    path = save(tmp_path, ONE, 7, keep=1)
    os.truncate(path / "rank-00000.bin", 0)
    assert save(tmp_path, ONE, 7, keep=1, seed=3) == path
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert load(path, ONE, seed=3) == (0, STATE)


def test_a_replacement_that_fails_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, ONE, 7)
    original = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".tmp-"):
            raise OSError(errno.EIO, "Input/output error", str(source))
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UserError, match="Input/output error"):
        save(tmp_path, ONE, 7, seed=3)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert load(path, ONE) == (0, STATE)


@pytest.mark.parametrize("full_rank", [0, 1])
def test_a_disk_that_fills_up_on_one_rank_is_an_error_on_all(tmp_path: Path, full_rank: int) -> None:
    previous = Path(run_ranks(2, save_on_rank, tmp_path, TWO, 1)[0])
    results = run_ranks(2, full_disk_on_rank, tmp_path, TWO, full_rank)
    for kind, text in results:
        assert kind == "UserError"
        assert f"rank-{full_rank:05d}.bin (No space left on device; " in text and " bytes needed, " in text
    assert [path.name for path in tmp_path.iterdir()] == [previous.name]
    assert verify_checkpoint(previous) == []


def test_a_disk_without_room_for_the_index(tmp_path: Path) -> None:
    results = run_ranks(2, full_disk_for_index, tmp_path, TWO)
    assert [kind for kind, _ in results] == ["UserError"] * 2
    assert all("index.json (No space left" in text for _, text in results)
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    results = run_ranks(2, broken_tensor_on_rank, tmp_path, TWO)
    assert results == [("CheckpointError", "LocalError: device is gone")] * 2
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_known_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, ONE, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(store, "start_temporary", lambda *_, **__: pytest.fail("began to write"))
    with pytest.raises(UserError, match=r"too full; \d{6} bytes needed, 1000 free\): free some space"):
        save(tmp_path, ONE, 2)
    assert find_checkpoints(tmp_path) == [1]


def test_a_place_that_cannot_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match=r"file/checkpoints \(Not a directory\): check"):
        save(tmp_path / "file" / "checkpoints", ONE, 1)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: original(fd, data[: max(1, len(data) // 3)]))
    path = save(tmp_path, ONE, 1)
    monkeypatch.undo()
    assert verify_checkpoint(path) == []
    assert load(path, ONE) == (0, STATE)
