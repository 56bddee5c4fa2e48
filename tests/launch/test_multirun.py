"""Several runs of one command line, one after another on the same ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama.config.load import load_yaml
from tests.launch.entry import torchrun
from tests.support.jobs import metrics, overrides, run_job


def losses(run_dir: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of a run."""
    return [(line["train/loss"], line["train/grad_norm"]) for line in metrics(run_dir)]


@pytest.mark.long
def test_multirun_under_torchrun_trains_every_value(tmp_path: Path) -> None:
    """Each job has a folder of its own and is the run that it would be alone, bit for bit."""
    words = [word for word in overrides(tmp_path, run_name="sweep") if not word.startswith("optim.lr")]
    done = torchrun(["--multirun", *words, "optim.lr=1e-3,2e-3"], folder=tmp_path)
    assert done.returncode == 0, done.stdout
    for index, rate in enumerate((1e-3, 2e-3)):
        folder = tmp_path / "sweep" / str(index)
        config = load_yaml(folder / "config.yaml")
        assert (config.optim.lr, config.train.run_dir) == (rate, str(folder))
        alone = run_job(tmp_path, 2, f"optim.lr={rate}", run_name=f"alone{index}")
        assert len(alone) == 5 and losses(folder) == alone
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000005"]
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["0", "1"]
    first, second = losses(tmp_path / "sweep" / "0"), losses(tmp_path / "sweep" / "1")
    assert first[0] == second[0] and first[-1] != second[-1], "the same start, and another rate since"
