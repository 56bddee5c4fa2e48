"""The convention of all commands: inputs are positional, `--output` is written, a mistake shows its own usage."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from megallama.cli import _parser, main
from megallama.host.errors import EXIT_USER_ERROR

INPUTS = {"source", "path", "paths", "run_dir", "inputs", "first", "second", "tokenizer", "overrides"}
"""What positional arguments stand for: all of it is read, none written."""


def commands(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Every command of the program with its words."""
    deeper = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not deeper:
        yield words, parser
    for action in deeper:
        for name, child in action.choices.items():
            yield from commands(child, (*words, name))


COMMANDS = dict(commands(_parser()))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_inputs_are_positional_and_output_is_an_option(words: tuple[str, ...]) -> None:
    actions = COMMANDS[words]._actions
    assert {action.dest for action in actions if not action.option_strings} <= INPUTS
    written = [action.option_strings for action in actions if "output" in action.dest]
    assert written in ([], [["--output"]])


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_mistake_shows_the_usage_of_the_command(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = [action for action in COMMANDS[words]._actions if not action.option_strings]
    needed = [action for action in COMMANDS[words]._actions if action.required and action.option_strings]
    given = [value for action in needed for value in (action.option_strings[0], "1")]
    with pytest.raises(SystemExit) as stop:
        main([*words, *("1" for _ in inputs), *given, "--no-such-option"])
    said = capsys.readouterr().err
    name = " ".join(("megallama", *words))
    assert stop.value.code == EXIT_USER_ERROR
    assert said.startswith(f"usage: {name} [-h]") and said.count("usage: ") == 1
    assert said.endswith(f"{name}: error: unrecognized arguments: --no-such-option\n")


def test_options_are_not_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["check", "--world", "2"])
    assert "unrecognized arguments: --world" in capsys.readouterr().err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("megallama ")
