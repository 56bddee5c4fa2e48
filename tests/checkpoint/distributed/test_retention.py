"""Which checkpoints are removed after a save, and that one which was read back always stays."""

import logging
import os
from pathlib import Path

import pytest

from megallama.checkpoint.distributed import retention
from megallama.checkpoint.distributed.retention import remove_old
from megallama.checkpoint.format import integrity as verify
from megallama.checkpoint.format.protocol import find_checkpoints
from megallama.topology.agreement import Ranks
from tests.checkpoint.ranks_at_work import save, save_keeping_two
from tests.checkpoint.synthetic import Layout
from tests.support.ranks import run_ranks

ONE = Layout(1, 1)


def damage(directory: Path, step: int) -> None:
    """One bit of the data: sizes are as they were."""
    path = directory / f"step-{step:08d}" / "rank-00000.bin"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def retain(directory: Path, step: int, *, keep: int, keep_every: int = 0, verified: set[int]) -> list[int]:
    """The steps that are left."""
    remove_old(directory, step=step, keep=keep, keep_every=keep_every, verified=verified, ranks=Ranks())
    return find_checkpoints(directory)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said; torch logs below that."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save(tmp_path, ONE, step, keep=2)
    assert find_checkpoints(tmp_path) == [15, 20]
    save(tmp_path, ONE, 25, keep=0)
    assert find_checkpoints(tmp_path) == [15, 20, 25]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{s:08d}" for s in (15, 20, 25)]


def test_every_so_many_steps_one_stays_for_good(tmp_path: Path) -> None:
    for step in range(5, 60, 5):
        save(tmp_path, ONE, step, keep=2, keep_every=20)
    assert find_checkpoints(tmp_path) == [20, 40, 50, 55]
    assert retain(tmp_path, 55, keep=1, keep_every=40, verified=set()) == [40, 55]
    assert retain(tmp_path, 55, keep=1, verified=set()) == [55]


def test_damaged_and_later_ones_do_not_count(tmp_path: Path) -> None:
    for step in (1, 2, 3, 9):
        save(tmp_path, ONE, step)
    os.truncate(tmp_path / "step-00000002" / "rank-00000.bin", 1)
    save(tmp_path, ONE, 4, keep=2)
    assert find_checkpoints(tmp_path) == [3, 4, 9]
    os.truncate(tmp_path / "step-00000003" / "rank-00000.bin", 1)
    save(tmp_path, ONE, 5, keep=2)
    assert find_checkpoints(tmp_path) == [4, 5, 9]


def test_the_last_intact_one_is_never_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        save(tmp_path, ONE, step)
    damage(tmp_path, 2)
    damage(tmp_path, 3)
    assert retain(tmp_path, 3, keep=2, verified=set()) == [1, 2, 3]
    assert [line.split(" (")[0] for line in warnings_in(caplog)] == [
        f"checkpoint {tmp_path}/step-0000000{step} is damaged" for step in (3, 2)
    ]
    # Known from before to be damaged or not: what was read back in this run is believed.
    assert retain(tmp_path, 3, keep=2, verified={1}) == [1, 2, 3]
    save(tmp_path, ONE, 4, keep=2)
    assert find_checkpoints(tmp_path) == [3, 4], "step 4 was read back"


def test_only_as_much_is_read_back_as_must_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counting(path: Path, *, rank: int, size: int) -> list[str]:
        read.append(path.name)
        return verify.problems_of_share(path, rank=rank, size=size)

    monkeypatch.setattr(retention, "problems_of_share", counting)
    verified = {1}
    for step in range(1, 7):
        save(tmp_path, ONE, step)
        wanted = [max(1, step - 1), step] if step > 1 else [1]
        assert retain(tmp_path, step, keep=2, verified=verified) == wanted
    # 1 is known; with 3, it goes: 3 is read and serves until 5 is written.
    assert read == ["step-00000003", "step-00000005"]
    assert verified == {5}


def test_a_checkpoint_that_cannot_be_removed_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, ONE, 1)

    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(retention, "remove", refuse)
    assert save(tmp_path, ONE, 2, keep=1).name == "step-00000002"
    assert find_checkpoints(tmp_path) == [1, 2]
    [line] = warnings_in(caplog)
    assert line.startswith("old checkpoints are not removed: ") and "Operation not permitted" in line


def test_ranks_share_the_reading(tmp_path: Path) -> None:
    assert run_ranks(2, save_keeping_two, tmp_path, Layout(1, 2)) == [{3}] * 2
    assert find_checkpoints(tmp_path) == [2, 3]
