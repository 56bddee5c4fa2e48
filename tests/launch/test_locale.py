"""A locale that is not UTF-8: UTF-8 inside all the same, and what the terminal cannot show ends nothing."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megallama.cli import main
from megallama.host.utf8 import text_of, use_utf8
from tests.launch.conftest import Workplace

BYTES = "\udcc4\udce3"
"""你 in GBK, as Python gives it to a program that runs in UTF-8."""


def test_text_that_is_not_utf8_is_one_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in (
        ["generate", str(tmp_path), "--prompt", BYTES],
        ["tokenizer", "inspect", str(tmp_path), "--text", BYTES],
        ["check", f"train.run_dir={BYTES}"],
    ):
        try:
            code = main(command)
        except SystemExit as stop:
            code = stop.code
        assert code == 2, command
        last = capsys.readouterr().err.splitlines()[-1]
        assert "\\udcc4\\udce3' is not in UTF-8: type it in a terminal that is set to UTF-8" in last, last
    assert text_of("你 😀") == "你 😀"


def test_what_the_terminal_lacks_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="gbk")
    monkeypatch.setattr(sys, "stdout", terminal)
    use_utf8()
    print("你😀", end="", flush=True)
    assert terminal.buffer.getvalue() == "你?".encode("gbk")  # type: ignore[attr-defined]


@pytest.fixture
def gbk(tmp_path: Path) -> dict[str, str]:
    """The environment of a shell in a Chinese locale of the old kind, which is made here."""
    if shutil.which("localedef") is None:
        pytest.skip("there is no localedef here")
    made = subprocess.run(
        ["localedef", "-i", "zh_CN", "-f", "GBK", str(tmp_path / "zh_CN.GBK")],
        capture_output=True,
        check=False,
    )
    if not (tmp_path / "zh_CN.GBK" / "LC_CTYPE").exists():
        pytest.skip(f"localedef lacks the sources of the locale ({made.stderr!r})")
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "PYTHONUTF8"))}
    variables |= {"LOCPATH": str(tmp_path), "LC_ALL": "zh_CN.GBK"}
    shown = subprocess.run(
        [sys.executable, "-c", "import sys; print(sys.stdout.encoding)"],
        env=variables,
        capture_output=True,
        check=True,
    )
    assert shown.stdout == b"gbk\n", (
        "without the locale Python falls back to UTF-8, and nothing would be tested"
    )
    return variables


@pytest.mark.long
def test_the_way_from_text_to_text_in_a_gbk_locale(gbk: dict[str, str], workplace: Workplace) -> None:
    """Ranks, workers and prompts; the run folder has a Chinese name."""

    def command(*words: str | bytes) -> str:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "megallama.cli",
                *(w if isinstance(w, bytes) else w.encode("gbk") for w in words),
            ],
            cwd=workplace.folder,
            env=gbk,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        said = done.stdout.decode("gbk")
        assert done.returncode == 0 and "Error" not in said, said
        return said

    command("prepare", "corpus", "--tokenizer", "tokenizer", "--output", "again", "--workers", "2")
    words = [word for word in workplace.arguments if not word.startswith("train.run_dir")]
    command("train", "--nproc-per-node", "1", *words, "train.run_dir=运行")
    assert os.fsencode(workplace.folder) + "/运行".encode("gbk") in map(
        os.fsencode, workplace.folder.iterdir()
    )
    for prompt in ("语言模型".encode("gbk"), "语言模型".encode()):
        said = command("generate", "运行", "--prompt", prompt, "--max-new-tokens", "20", "--temperature", "3")
        assert said.startswith("语言模型"), said
    assert "?" in command("tokenizer", "inspect", "tokenizer", "--text", "😀".encode())
