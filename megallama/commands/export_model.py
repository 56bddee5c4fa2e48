"""`megallama export`: converts a checkpoint to a Hugging Face model folder."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from megallama.commands.parser import Commands, add_ignore_key
from megallama.host.errors import UserError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add(commands: Commands) -> None:
    """Add `megallama export` to the command line."""
    parser = commands.add_parser("export", help="make a Hugging Face model out of a checkpoint")
    parser.add_argument("source", type=Path, help="a run folder (its newest checkpoint) or a step-... folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--dtype",
        choices=["fp32", "bf16", "fp16"],
        default=None,
        help="format of the weights (default: that of the imported model, else of the run)",
    )
    parser.add_argument("--max-shard-size", default="5GB", help="largest file of weights (default: 5GB)")
    parser.add_argument(
        "--like",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="take config.json, generation_config.json and tokenizer from this model (Hugging Face or imported)",
    )
    add_ignore_key(parser)
    parser.set_defaults(command=_export)


def parse_size(text: str) -> int:
    """Bytes of `500MB`, `5GB`, `1000000`.

    Raises:
        UserError: something else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text.strip().upper())
    unit = match and (match[2] if match[2].endswith("B") or not match[2] else match[2] + "B")
    if match and unit == "B":
        unit = ""
    size = int(float(match[1]) * _UNITS[unit]) if match and unit is not None else 0
    if size < 1:
        raise UserError(f"--max-shard-size ({text}) is not a size: give one such as 5GB or 500MB")
    return size


def _export(options: argparse.Namespace) -> None:
    from megallama.huggingface.export_model import export_model

    files = export_model(
        options.source,
        options.output,
        dtype=options.dtype,
        max_shard_bytes=parse_size(options.max_shard_size),
        like=options.like,
        ignore_keys=options.ignore_key,
        log=lambda line: print(f"warning: {line}", file=sys.stderr),
    )
    print(
        f"wrote {options.output}: {', '.join(files) if len(files) < 4 else f'{len(files)} files of weights'}"
    )
