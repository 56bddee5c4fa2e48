"""Numbers on the command line: what is none, endless, or below what makes sense is told, never a traceback."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

from megallama.cli import _parser, main
from megallama.commands.parser import text

RANGES_OF_THEIR_OWN = {
    *("--validation-fraction", "--character-coverage"),
    *("--temperature", "--top-p", "--repetition-penalty"),
}
"""Checked where they are used, with a message of their own."""


def options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options(command)
        elif action.type not in (None, Path, text):
            yield action.option_strings[0], action


def test_every_number_has_a_range() -> None:
    found = dict(options(_parser()))
    assert {name for name, action in found.items() if action.type in (int, float)} <= RANGES_OF_THEIR_OWN
    for name in found.keys() - RANGES_OF_THEIR_OWN:
        for word in ("nan", "inf", "-inf", "1e400", "-1", "一", ""):
            with pytest.raises(argparse.ArgumentTypeError, match="must be a"):
                found[name].type(word)  # type: ignore[operator,misc]


def test_the_message_names_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["prepare", "x", "--tokenizer", "t", "--output", "o", "--shard-tokens", "nan"])
    assert ended.value.code == 2
    assert "--shard-tokens: nan must be a number above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["prepare", "--tokenizer=t", "--validation-fraction=nan"],
            "--validation-fraction (nan) must be in [0, 1)",
        ),
        (["prepare", "--tokenizer=t", "--shard-tokens=0.5"], "--shard-tokens (0) must be at least 1"),
        (
            ["prepare", "--tokenizer=t", "--documents=blank_line", "--separator=＊"],
            "--documents blank_line and --separator ('＊') exclude each other: give one",
        ),
        (
            ["tokenizer", "train", "--vocab-size=400", "--character-coverage=nan"],
            "character_coverage (nan) must be",
        ),
        (
            ["tokenizer", "train", "--vocab-size=400", "--documents=file", "--separator=＊"],
            "--documents file and --separator ('＊') exclude each other: give one",
        ),
        (["tokenizer", "train", "--vocab-size=999999999999"], "sentencepiece refused to train"),
    ],
)
def test_what_is_checked_later(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "文.txt").write_text("天地玄黄，宇宙洪荒。\n" * 40, encoding="utf-8")
    assert main([*words, str(tmp_path / "文.txt"), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()
