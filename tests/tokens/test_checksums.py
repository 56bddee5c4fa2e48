"""`megallama data verify` reads every byte of what it is given, and names each file that differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama.cli import main
from megallama.config.load import load_config, to_yaml
from megallama.prepare.run import prepare
from tests.support.jobs import SMALL


@pytest.fixture
def prepared(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> Path:
    """A folder with both splits in shards."""
    folder = tmp_path / "数据"
    prepare([corpus], folder, tokenizer=tokenizer_path, validation_fraction=0.2, shard_tokens=3000, workers=1)
    return folder


def flip(path: Path, *, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def test_what_is_as_it_was_prepared_is_ok(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", str(prepared)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ok (")[0] for line in lines] == [
        str(prepared / "train"),
        str(prepared / "valid"),
    ]


@pytest.mark.parametrize(("name", "at"), [("train-00001.bin", -1), ("valid-00000.idx", 40)])
def test_one_bit_is_found_and_its_file_named(
    prepared: Path, name: str, at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(prepared / name, at=at)
    assert main(["data", "verify", str(prepared / "train"), str(prepared / "valid")]) == 1
    damaged, sound = sorted(capsys.readouterr().out.splitlines(), key=lambda line: ": ok (" in line)
    assert f"damaged ({prepared / name} is not what was prepared (sha256 " in damaged
    assert ": ok (" in sound


def test_every_damage_is_told_and_nothing_without_a_manifest_is_called_ok(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(prepared / "train-00000.bin", at=0)
    flip(prepared / "train-00001.bin", at=0)
    (prepared / "valid-00000.bin").write_bytes(b"")
    assert main(["data", "verify", str(prepared)]) == 1
    shown = capsys.readouterr().out
    assert all(
        name in shown for name in ("train-00000.bin", "train-00001.bin", "valid-00000.bin is truncated")
    )
    plain = prepared / "train-00002"
    plain.with_suffix(".json").unlink()
    assert main(["data", "verify", str(plain)]) == 0
    assert capsys.readouterr().out == f"{plain}: no manifest: only its index and sizes are compared\n"


def test_a_run_folder_stands_for_its_data(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    source, validation = prepared / "train", prepared / "valid"
    config = load_config(
        [*SMALL, f"data.sources=[{source}]", f"data.validation=[{validation}]", f"train.run_dir={run}"]
    )
    (run / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert main(["data", "verify", str(run), str(source)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2, "each once"
    flip(prepared / "valid-00000.bin", at=7)
    assert main(["data", "verify", str(run)]) == 1


def test_what_is_no_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", str(tmp_path / "无")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / '无'} is no data (no .bin")
