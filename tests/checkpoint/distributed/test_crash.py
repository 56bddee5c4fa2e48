"""SIGKILL at any moment of a save leaves the previous checkpoint intact and found."""

import multiprocessing
import signal
from pathlib import Path

import pytest

from megallama.checkpoint.format.integrity import latest_checkpoint, verify_checkpoint
from megallama.checkpoint.format.protocol import find_checkpoints
from tests.checkpoint.ranks_at_work import MOMENTS, die_while_saving, load, save, save_on_rank
from tests.checkpoint.synthetic import STATE, Layout
from tests.support.ranks import run_ranks

ONE = Layout(1, 1)


def kill(directory: Path, step: int, moment: str, keep: int = 0) -> None:
    """A process that saves and is killed at `moment`."""
    process = multiprocessing.get_context("forkserver").Process(
        target=die_while_saving, args=(directory, ONE, step, moment, keep)
    )
    process.start()
    process.join(1800)
    assert process.exitcode == -signal.SIGKILL, (moment, process.exitcode)


def latest(directory: Path) -> str:
    """Name of the latest checkpoint; no line may be logged."""
    lines: list[str] = []
    path = latest_checkpoint(directory, log=lines.append)
    assert lines == [] and path is not None
    return path.name


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_saving(tmp_path: Path, moment: str) -> None:
    previous = save(tmp_path, ONE, 1)
    kill(tmp_path, 2, moment)
    [left] = [path.name for path in tmp_path.iterdir() if path != previous]
    assert left.startswith(".tmp-step-00000002-")
    assert latest(tmp_path) == "step-00000001"
    assert load(previous, ONE) == (0, STATE)
    save(tmp_path, ONE, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    assert latest(tmp_path) == "step-00000002"


def test_killed_on_one_rank_of_two(tmp_path: Path) -> None:
    layout = Layout(1, 2)
    previous = Path(run_ranks(2, save_on_rank, tmp_path, layout, 1)[0])
    with pytest.raises(AssertionError, match="rank . of 2 failed"):
        run_ranks(2, die_while_saving, tmp_path, layout, 2, "within a data file")
    assert find_checkpoints(tmp_path) == [1]
    assert verify_checkpoint(previous) == []
    assert load(previous, ONE) == (0, STATE)


def test_killed_while_replacing_the_same_step(tmp_path: Path) -> None:
    save(tmp_path, ONE, 1)
    kill(tmp_path, 1, "between the renames")
    assert find_checkpoints(tmp_path) == []
    assert latest(tmp_path) == "step-00000001"
    assert load(tmp_path / "step-00000001", ONE) == (0, STATE)
    save(tmp_path, ONE, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_killed_while_removing_old_ones(tmp_path: Path) -> None:
    save(tmp_path, ONE, 1)
    kill(tmp_path, 2, "within the removal of old ones", keep=1)
    assert find_checkpoints(tmp_path) == [2]
    assert latest(tmp_path) == "step-00000002"
    assert load(tmp_path / "step-00000002", ONE, seed=1) == (0, STATE)
    save(tmp_path, ONE, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
