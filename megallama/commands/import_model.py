"""`megallama import`: converts a Hugging Face model folder to a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from megallama.commands.parser import Commands, add_ignore_key, whole_number


def add(commands: Commands) -> None:
    """Add `megallama import` to the command line."""
    parser = commands.add_parser("import", help="make a checkpoint to train from out of a Hugging Face model")
    parser.add_argument("source", type=Path, help="folder with config.json and .safetensors files")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--name", default=None, help="name of the shape (default: that of the output folder)")
    parser.add_argument(
        "--vocab-multiple",
        type=whole_number(least=1),
        default=128,
        help="pad the embedding to a multiple of this (default: 128)",
    )
    add_ignore_key(parser)
    parser.set_defaults(command=_import)


def _import(options: argparse.Namespace) -> None:
    from megallama.huggingface.import_model import import_model
    from megallama.model.counts import count_parameters

    model = import_model(
        options.source,
        options.output,
        name=options.name,
        vocab_multiple=options.vocab_multiple,
        ignore_keys=options.ignore_key,
    )
    print(f"wrote {options.output}: {model.name}, {count_parameters(model, padded=False):,} parameters")
    print(
        f"train from it: megallama train --config-dir {options.output}/conf model={model.name}"
        f" train.init_from={options.output} ..."
    )
