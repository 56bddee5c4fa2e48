"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from megallama.host.errors import UserError

if TYPE_CHECKING:
    from megallama.corpus.corpus import Documents

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


_MOST = 10**15


def positive_number(text: str) -> float:
    """An argument that is a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= _MOST:
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0, {_MOST:.0e} at most")
    return value


def whole_number(*, least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number of at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= _MOST:
            raise argparse.ArgumentTypeError(
                f"{text} must be a whole number, {least} at least, {_MOST:.0e} at most"
            )
        return value

    return parse


class CommandParser(argparse.ArgumentParser):
    """The parser of one command: names no other in its messages, and takes options among the words of a run."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's; words that come after an option join `overrides`, and what is left over is a mistake here.

        argparse would leave it to the program's own parser to refuse it, with the program's usage.
        """
        options, rest = super().parse_known_args(args, namespace)
        if "overrides" in options:
            options.overrides += [word for word in rest if not word.startswith("-")]
            rest = [word for word in rest if word.startswith("-")]
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return options, []


def add_ignore_key(parser: argparse.ArgumentParser) -> None:
    """Add what accepts unknown keys of a config.json by name."""
    parser.add_argument(
        "--ignore-key",
        action="append",
        default=[],
        metavar="NAME",
        help="accept this unknown key of config.json, which you know to change nothing in what the model computes",
    )


def add_corpus_options(parser: argparse.ArgumentParser, *, has_inputs: bool = True) -> None:
    """Add what says which text is read and how it falls into documents."""
    if has_inputs:
        parser.add_argument(
            "inputs",
            nargs="+",
            help="files, globs, or folders of .txt, JSON lines (.jsonl, .ndjson, .json) and .parquet; .gz, .zst, .xz"
            " and .bz2 of the first two",
        )
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
        default=None,
        help="what a document of a text file is (default: the whole file)",
    )
    parser.add_argument(
        "--separator",
        default="",
        metavar="LINE",
        help="text files: documents end at lines that are exactly this",
    )
    parser.add_argument(
        "--text-field",
        default="text",
        help="field of a JSON line, or column of a .parquet file, that holds the text; data.text for one inside",
    )
    parser.add_argument("--seed", type=whole_number(least=0), default=1234)


def documents_of(options: argparse.Namespace) -> Documents:
    """What a document of a text file is, by these options.

    Raises:
        UserError: both are given.
    """
    if options.separator and options.documents:
        raise UserError(
            f"--documents {options.documents} and --separator ({options.separator!r}) exclude each other: give one"
        )
    return "separator" if options.separator else options.documents or "file"
