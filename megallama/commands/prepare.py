"""`megallama prepare`."""

from __future__ import annotations

import argparse

from megallama.commands.parser import Commands, add_corpus_options


def add(commands: Commands) -> None:
    """Add `megallama prepare` to the command line."""
    prepare = commands.add_parser("prepare", help="tokenize text into datasets to train on")
    add_corpus_options(prepare)
    prepare.add_argument(
        "--tokenizer", required=True, help="tokenizer.model, tokenizer.json, or their folder"
    )
    prepare.add_argument("--output", required=True, help="folder that gets train.* and valid.*")
    prepare.add_argument("--validation-fraction", type=float, default=0.01)
    prepare.add_argument("--workers", type=int, default=None, help="processes (default: all cores)")
    prepare.add_argument("--overwrite", action="store_true", help="replace an existing output")
    prepare.set_defaults(command=_prepare)


def _prepare(options: argparse.Namespace) -> None:
    from megallama.data.prepare import prepare
    from megallama.metrics.progress import progress_bar

    with progress_bar("tokenizing") as progress:
        report = prepare(
            options.inputs,
            options.output,
            tokenizer=options.tokenizer,
            validation_fraction=options.validation_fraction,
            seed=options.seed,
            workers=options.workers,
            suffixes=options.suffix,
            documents=options.documents,
            text_field=options.text_field,
            overwrite=options.overwrite,
            progress=progress,
        )
    print(f"{report.source_files} files, {report.source_bytes / 1e6:.1f} MB")
    for split in (report.train, report.validation):
        if split is not None:
            print(f"  {split.prefix}: {split.documents:,} documents, {split.tokens:,} tokens")
