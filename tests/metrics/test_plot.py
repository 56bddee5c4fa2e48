"""The loss curve, and the bar of other work."""

from __future__ import annotations

import math
import os
import pty
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from megallama.host.errors import UserError
from megallama.metrics.jsonl import JsonlSink
from megallama.metrics.plot import LEVEL, TRAIN, VALIDATION, plot_loss, smoothed
from megallama.metrics.progress import progress_bar


def write_run(run_dir: Path, *, steps: int = 100, with_validation: bool = True, nan_at: int = 0) -> Path:
    run_dir.mkdir()
    sink = JsonlSink(run_dir / "metrics.jsonl", first_step=0)
    for step in range(1, steps + 1):
        numbers = {"train/loss": math.nan if step == nan_at else 2 + 5 * math.exp(-step / 30)}
        if with_validation and step % 20 == 0:
            numbers["eval/loss"] = numbers["train/loss"] + 0.5
        sink.write(step, numbers)
    sink.close()
    return run_dir


def count_pixels(png: Path, color: str) -> int:
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    image = np.round(matplotlib.image.imread(png)[:, :, :3] * 255)
    return int((np.abs(image - rgb).max(axis=2) <= 2).sum())


def test_curve_validation_and_level_are_drawn(tmp_path: Path) -> None:
    run_dir, png = write_run(tmp_path / "运行"), tmp_path / "损失.png"
    plot_loss(run_dir, png, unigram_loss=5.5)
    assert all(count_pixels(png, color) > 200 for color in (TRAIN, VALIDATION, LEVEL))


def test_what_is_not_there_is_not_drawn(tmp_path: Path) -> None:
    run_dir, png = write_run(tmp_path / "run", with_validation=False), tmp_path / "loss.png"
    plot_loss(run_dir, png)
    assert count_pixels(png, TRAIN) > 200
    assert count_pixels(png, VALIDATION) == 0


def test_step_without_a_finite_loss_leaves_no_gap(tmp_path: Path) -> None:
    for name, nan_at in (("whole", 0), ("broken", 7)):
        plot_loss(write_run(tmp_path / name, nan_at=nan_at), tmp_path / f"{name}.png")
    whole, broken = (count_pixels(tmp_path / f"{name}.png", TRAIN) for name in ("whole", "broken"))
    assert broken == pytest.approx(whole, rel=0.05)


def test_one_step_is_visible(tmp_path: Path) -> None:
    plot_loss(write_run(tmp_path / "run", steps=1), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_nothing_to_plot(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no training loss to plot"):
        plot_loss(tmp_path, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_smoothing_has_no_bias_at_the_start() -> None:
    assert smoothed([3.0] * 500) == pytest.approx([3.0] * 500)
    assert smoothed([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]


def test_bar_is_silent_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("分词") as progress:
        progress(1, 2)
    assert capsys.readouterr() == ("", "")


def test_bar_on_a_terminal() -> None:
    program = (
        "from megallama.metrics.progress import progress_bar\n"
        "with progress_bar('分词 [a]') as progress:\n    progress(3_000_000, 4_000_000)\n"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    subprocess.run([sys.executable, "-c", program], stderr=theirs, env=environment, check=True)
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "分词 [a]" in shown and "3.0/4.0 MB" in shown
