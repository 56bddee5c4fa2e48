"""`megallama checkpoint list|verify|info` on whole, damaged and weights-only checkpoints."""

import os
from pathlib import Path

import pytest
import torch

from megallama.checkpoint.offline.writer import CheckpointWriter
from megallama.cli import main
from tests.checkpoint.synthetic import MODEL

LAYOUT = {"ranks": 4, "dp": 2, "tp": 2, "pp": 1, "cp": 1, "vp": 1, "zero": 3, "dtype": "bf16"}
PROGRESS = {"step": 7, "consumed_samples": 56, "consumed_tokens": 1792}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Checkpoints of steps 3 and 7 of a run."""
    for step in (3, 7):
        state = {"progress": PROGRESS, "layout": LAYOUT}
        with CheckpointWriter(
            tmp_path / "运行" / "checkpoints", step=step, model=MODEL, state=state
        ) as writer:
            for kind in ("fp32", "exp_avg"):
                writer.write(f"{kind}/w", torch.full((50, 10), float(step)))
    return tmp_path / "运行"


def test_list(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(run_dir / "checkpoints" / "step-00000003" / "rank-00000.bin", 100)
    os.utime(run_dir / "checkpoints" / "step-00000007" / "manifest.json", (0, 1))
    assert main(["checkpoint", "list", str(run_dir)]) == 0
    header, old, new = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", "size", "age", "layout", "state"]
    assert old.startswith("3 ") and "4 ranks dp2 tp2 zero3 bf16" in old
    assert "damaged: rank-00000.bin has 100 bytes, the manifest says 40" in old
    assert new.startswith("7 ") and new.endswith("  complete") and " kB " in new and " d " in new


def test_list_when_there_is_no_manifest(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "checkpoints" / "step-00000007" / "manifest.json").unlink()
    assert main(["checkpoint", "list", str(run_dir)]) == 0
    assert "damaged: manifest.json is missing" in capsys.readouterr().out


def test_verify(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.endswith(": ok") for line in lines)
    file = run_dir / "checkpoints" / "step-00000007" / "rank-00000.bin"
    raw = bytearray(file.read_bytes())
    raw[5] ^= 1
    file.write_bytes(raw)
    assert main(["checkpoint", "verify", str(run_dir)]) == 1
    old, new = capsys.readouterr().out.splitlines()
    assert old.endswith("step-00000003: ok")
    assert new.endswith("step-00000007: damaged (rank-00000.bin does not match its checksum)")
    assert main(["checkpoint", "verify", str(file.parent.with_name("step-00000003"))]) == 0


@pytest.mark.parametrize("action", ["list", "verify", "info"])
def test_nothing_there(tmp_path: Path, action: str, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (tmp_path, tmp_path / "absent", tmp_path / "step-00000001"):
        assert main(["checkpoint", action, str(place)]) == 2
        assert capsys.readouterr().err == (
            f"error: no checkpoint at {place}: give a step-... directory or the train.run_dir of a run\n"
        )


def test_info(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "info", str(run_dir), "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "step-00000007\n" in out and "written by  4 ranks dp2 tp2 zero3 bf16\n" in out
    assert "step        7\nconsumed    1,792 tokens, 56 samples\n" in out
    assert "tensors     2 (exp_avg, fp32), 500 parameters\nmodel\n  hidden_size: 16\n" in out
    assert "  name: 小模型\n" in out and "fp32/w     [50, 10]  torch.float32\n" in out
    os.truncate(run_dir / "checkpoints" / "step-00000007" / "index.json", 0)
    assert main(["checkpoint", "info", str(run_dir)]) == 0
    assert "step        3\n" in capsys.readouterr().out
    assert main(["checkpoint", "info", str(run_dir / "checkpoints" / "step-00000007")]) == 2
    assert "step-00000007 is damaged (index.json has 0 bytes" in capsys.readouterr().err


def test_info_of_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with CheckpointWriter(tmp_path, step=0, model={}, state={}) as writer:
        writer.write("fp32/w", torch.ones(3))
    assert main(["checkpoint", "info", str(tmp_path)]) == 0
    assert "consumed    nothing: weights only, for train.init_from\n" in capsys.readouterr().out
