"""The wheel: what it holds, and that the commands work from it in any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.places import ROOT


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what an installation of the wheel would put into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    for name in ("megallama", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("megallama-*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
    return folder / "site"


def files(folder: Path, suffix: str) -> set[str]:
    """Files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob(f"*{suffix}")}


def test_the_wheel_holds_the_package_and_the_configurations(unpacked: Path) -> None:
    assert files(unpacked / "megallama", ".py") == files(ROOT / "megallama", ".py")
    assert files(unpacked / "megallama" / "conf", ".yaml") == files(ROOT / "conf", ".yaml")
    (information,) = (path for path in unpacked.iterdir() if path.name != "megallama")
    assert information.name.endswith(".dist-info")
    assert "megallama = megallama.cli:main" in (information / "entry_points.txt").read_text()


def megallama(unpacked: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in `folder`, from the wheel alone."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "megallama.cli", *arguments],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_commands_work_in_an_empty_folder(unpacked: Path, tmp_path: Path) -> None:
    missing = megallama(unpacked, tmp_path, "check", "+exp=demo", "data.tokenizer=null")
    assert missing.returncode == 2, missing.stderr
    assert "build/demo/data/train does not exist" in missing.stderr, "all else of the run is sound"
    (tmp_path / "mine" / "exp").mkdir(parents=True)
    text = (ROOT / "conf" / "exp" / "demo.yaml").read_text(encoding="utf-8")
    (tmp_path / "mine" / "exp" / "own.yaml").write_text(text, encoding="utf-8")
    shown = megallama(unpacked, tmp_path, "train", "+exp=own", "--config-dir", "mine", "--cfg", "job")
    assert shown.returncode == 0 and "num_layers: 4" in shown.stdout, shown.stderr
    where = "import megallama.config.load as load; print(load.CONF_DIR)"
    found = subprocess.run(
        [sys.executable, "-c", where],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(unpacked / "megallama" / "conf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
