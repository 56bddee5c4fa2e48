"""Every command of the Chinese guide, in its order, with fewer steps: from a novel to a model that continues it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megallama.checkpoint.offline.reader import CheckpointReader
from megallama.tokenizers.load import load_tokenizer
from tests.support.jobs import metrics
from tests.support.materials import FOLDER, MISTRAL, chinese_chapters
from tests.support.places import ROOT

FEWER = {
    "train.steps=100": "train.steps=4",
    "train.steps=300": "train.steps=6",
    "partial_steps=50": "partial_steps=3",
}
PACE = ["checkpoint.interval=3", "checkpoint.keep=0", "log.tensorboard=false", "log.wandb=disabled"]


def commands() -> list[str]:
    """Shell commands of the guide, continuation lines joined."""
    text = (ROOT / "docs" / "zh" / "chinese-model.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_commands_of_the_guide_do_what_it_says(tmp_path):
    for name in ("launch", "conf", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "materials").symlink_to(FOLDER)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = {}
    for line in commands():
        for long, short in FEWER.items():
            line = line.replace(long, short)
        if "megallama train" in line:
            line += " " + " ".join(PACE)
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        said[" ".join(line.split()[:3])] = done.stdout

    # The guide's own numbers.
    text = (ROOT / "docs" / "zh" / "chinese-model.md").read_text(encoding="utf-8")
    merged = said["megallama tokenizer merge"]
    for line in merged.splitlines():
        if line.startswith(("wrote", "chinese", "lines that", "  left out")):
            assert line in text, line
    assert "却说曹操|大军|行至|赤壁|，|时值|冬|月|。" in said["megallama tokenizer inspect"]

    old, new = load_tokenizer(MISTRAL), load_tokenizer(tmp_path / "build/zh/tokenizer")
    assert new.vocab_size == 38_501
    assert all(old.label(token) == new.label(token) for token in range(32_000))
    for line in "\n".join(chinese_chapters()).split("\n"):
        assert new.decode(new.encode(line)) == line

    def weights(run, step):
        return dict(CheckpointReader(tmp_path / run / "checkpoints" / f"step-{step:08d}").read_all())

    start, third, last = weights("build/zh/start", 0), weights("runs/zh", 3), weights("runs/zh", 6)
    before = weights("runs/zh-base", 4)
    for name, tensor in start.items():
        rows = min(len(tensor), 32_000)
        assert before[name][:rows].equal(tensor[:rows]) and third[name][:rows].equal(tensor[:rows]), name
        assert not last[name].equal(third[name]), name
    assert len(metrics(tmp_path / "runs/zh")) == 6 and "eval/loss" in metrics(tmp_path / "runs/zh")[-1]
    assert said["megallama generate runs/zh"].startswith("却说曹操")
