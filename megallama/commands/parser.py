"""What the commands share of their arguments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class WordsParser(argparse.ArgumentParser):
    """Takes options among the words of a run, as launch/train.py does: argparse offers that to no sub-command."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's; words that come after an option join `overrides`."""
        options, rest = super().parse_known_args(args, namespace)
        if "overrides" not in options:
            return options, rest
        options.overrides += [word for word in rest if not word.startswith("-")]
        return options, [word for word in rest if word.startswith("-")]


def add_run_words(parser: argparse.ArgumentParser) -> None:
    """Add the words that launch/train.py takes."""
    parser.add_argument("overrides", nargs="*", help="what launch/train.py is given: +exp=... key=value ...")
    parser.add_argument(
        "--multirun", "-m", action="store_true", help="every combination of the values that words list"
    )
    parser.add_argument(
        "--config-dir", "-cd", type=Path, default=None, help="a folder with model/ or exp/ of your own"
    )


def add_corpus_options(parser: argparse.ArgumentParser, *, has_inputs: bool = True) -> None:
    """Add what says which text is read and how it falls into documents."""
    if has_inputs:
        parser.add_argument("inputs", nargs="+", help="files, globs, or folders of .txt and .jsonl")
    parser.add_argument(
        "--suffix",
        action="append",
        default=[],
        metavar=".EXT",
        help="further file endings to take from folders",
    )
    parser.add_argument(
        "--documents",
        choices=["file", "blank_line"],
        default="file",
        help="what a document of a text file is (default: the whole file)",
    )
    parser.add_argument("--text-field", default="text", help="field of a .jsonl line that holds the text")
    parser.add_argument("--seed", type=int, default=1234)
