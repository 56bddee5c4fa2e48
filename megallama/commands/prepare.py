"""`megallama prepare`: raw text to token files."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megallama.commands.parser import (
    Commands,
    add_corpus_options,
    documents_of,
    positive_number,
    whole_number,
)
from megallama.tokenizers.begin import BEGINS

if TYPE_CHECKING:
    from megallama.prepare.report import PrepareReport


def add(commands: Commands) -> None:
    """Add `megallama prepare` to the command line."""
    prepare = commands.add_parser(
        "prepare",
        help="tokenize text into datasets to train on",
        description="Tokenizes text, JSON lines and Parquet. Killed or stopped by an error, the"
        " same command goes on where it was.",
    )
    add_corpus_options(prepare)
    prepare.add_argument(
        "--tokenizer",
        required=True,
        help="tokenizer.model, tokenizer.json, a .tiktoken file, or their folder",
    )
    prepare.add_argument(
        "--begin-token",
        choices=BEGINS,
        default="tokenizer",
        help="whether each document begins with the tokenizer's begin token (default: where its files say so)",
    )
    prepare.add_argument("--output", required=True, help="folder that gets train.* and valid.*")
    prepare.add_argument("--validation-fraction", type=float, default=0.01)
    prepare.add_argument(
        "--shard-tokens",
        type=positive_number,
        default=None,
        metavar="N",
        help="cut the output into files of N tokens: 1e9",
    )
    prepare.add_argument(
        "--max-damaged",
        type=whole_number(least=0),
        default=0,
        metavar="N",
        help="leave out up to N records that are not UTF-8, no JSON or without text, and list them in damaged.jsonl"
        " (default 0: stop at the first)",
    )
    prepare.add_argument(
        "--workers", type=whole_number(least=1), default=None, help="processes (default: all cores)"
    )
    prepare.add_argument("--overwrite", action="store_true", help="replace an existing output")
    prepare.set_defaults(command=_prepare)


def _prepare(options: argparse.Namespace) -> None:
    from megallama.metrics.progress import progress_bar
    from megallama.prepare.run import prepare

    with progress_bar("tokenizing") as progress:
        report = prepare(
            options.inputs,
            options.output,
            tokenizer=options.tokenizer,
            validation_fraction=options.validation_fraction,
            seed=options.seed,
            workers=options.workers,
            suffixes=options.suffix,
            documents=documents_of(options),
            separator=options.separator,
            text_field=options.text_field,
            shard_tokens=None if options.shard_tokens is None else int(options.shard_tokens),
            max_damaged=options.max_damaged,
            begin=options.begin_token,
            overwrite=options.overwrite,
            progress=progress,
        )
    _show(report)


def _show(report: PrepareReport) -> None:
    from megallama.corpus.inputs import describe_passed_over

    print(f"{report.source_files} files, {report.source_bytes / 1e6:.1f} MB")
    if report.was_complete:
        print("  an earlier attempt was interrupted at its very end: its files have their names now")
    elif report.resumed_bytes:
        print(f"  {report.resumed_bytes / 1e6:.1f} MB of them were tokenized before")
    for source in report.sources:
        shares = [f"{script} {share:.0%}" for script, share in source.script_shares.items() if share >= 0.005]
        print(
            f"  {source.name}: {source.documents:,} documents, {source.tokens:,} tokens"
            + (f" (letters: {', '.join(shares)})" if shares else "")
        )
        if source.text_bytes:
            languages = [
                f"{name} {source.language_documents[name]:,} documents ({count / source.text_bytes:.0%} of bytes)"
                for name, count in source.language_bytes.most_common()
            ]
            print(f"    likely languages: {', '.join(languages)}")
        if source.marked_documents:
            print(
                f"    {source.marked_documents:,} documents hold U+2581, which this tokenizer takes for a space"
            )
    print(f"  each document {_framed(report)}")
    if report.passed_over:
        total = report.passed_over.total()
        print(f"  not read: {total:,} ({describe_passed_over(report.passed_over)})")
    if report.damaged:
        print(f"  {len(report.damaged):,} damaged records left out: see damaged.jsonl")
    for split in (report.train, report.validation):
        if split is not None:
            shards = f" in {split.shards:,} shards" if split.shards else ""
            print(f"  {split.prefix}: {split.documents:,} documents, {split.tokens:,} tokens{shards}")


def _framed(report: PrepareReport) -> str:
    """Which tokens stand before and after each document."""
    tokenizer, begin_id = report.tokenizer, report.begin_id
    end = f"ends with {tokenizer.label(tokenizer.eod_id)} ({tokenizer.eod_id})"
    if begin_id is not None:
        return f"begins with {tokenizer.label(begin_id)} ({begin_id}) and {end}"
    if tokenizer.bos_id is None:
        return end
    return f"{end}; none begins with {tokenizer.label(tokenizer.bos_id)} (--begin-token always puts it there)"
