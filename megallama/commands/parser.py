"""What the commands share of their arguments."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from megallama.data.corpus import Documents

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


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
    parser.add_argument(
        "--separator",
        default="",
        metavar="LINE",
        help="text files: documents end at lines that are exactly this",
    )
    parser.add_argument("--text-field", default="text", help="field of a .jsonl line that holds the text")
    parser.add_argument("--seed", type=int, default=1234)


def documents_of(options: argparse.Namespace) -> Documents:
    """What a document of a text file is, by these options."""
    return "separator" if options.separator else options.documents
