"""`megallama tokenizer`: trains, inspects and merges tokenizers."""

from __future__ import annotations

import argparse

from megallama.commands.parser import (
    Commands,
    add_corpus_options,
    documents_of,
    positive_number,
    text,
    whole_number,
)


def add(commands: Commands) -> None:
    """Add `megallama tokenizer` to the command line."""
    tokenizer = commands.add_parser("tokenizer", help="train, merge or inspect a tokenizer")
    actions = tokenizer.add_subparsers(metavar="ACTION", required=True)
    _add_train(actions)
    _add_merge(actions)
    inspect = actions.add_parser("inspect", help="show what a tokenizer is made of and how it cuts text")
    inspect.add_argument("tokenizer", help="tokenizer file or its folder")
    inspect.add_argument(
        "--text", type=text, action="append", default=[], help="text to cut (default: samples)"
    )
    inspect.set_defaults(command=_inspect_tokenizer)


def _add_train(actions: Commands) -> None:
    train = actions.add_parser("train", help="train a sentencepiece tokenizer with byte fallback")
    add_corpus_options(train)
    train.add_argument("--output", required=True, help="folder that gets tokenizer.model")
    train.add_argument(
        "--vocab-size", type=whole_number(least=1), required=True, help="number of token ids, bytes included"
    )
    train.add_argument("--model-type", choices=["bpe", "unigram"], default="bpe")
    train.add_argument(
        "--character-coverage", type=float, default=0.9995, help="share of characters with ids"
    )
    train.add_argument(
        "--normalization",
        choices=["identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"],
        default="identity",
        help="change of the text before it is cut (default: none; the others make Chinese punctuation ASCII)",
    )
    train.add_argument("--no-split-digits", action="store_true", help="let numbers be tokens")
    train.add_argument("--no-byte-fallback", action="store_true", help="lose characters without an id")
    train.add_argument(
        "--user-symbol",
        type=text,
        action="append",
        default=[],
        metavar="TEXT",
        help="text that is always one token",
    )
    train.add_argument(
        "--sample-mb", type=positive_number, default=100.0, help="most text to train on, in MB"
    )
    train.add_argument("--overwrite", action="store_true", help="replace the tokenizer in the output folder")
    train.set_defaults(command=_train_tokenizer)


def _add_merge(actions: Commands) -> None:
    merge = actions.add_parser("merge", help="add the pieces of a second sentencepiece model to a first")
    merge.add_argument("first", help="sentencepiece model whose ids all stay")
    merge.add_argument("second", help="sentencepiece model whose other pieces are added")
    merge.add_argument("--output", required=True, help="folder that gets tokenizer.model")
    merge.add_argument(
        "--max-pieces", type=whole_number(least=1), default=None, help="most pieces to add (default: all)"
    )
    merge.add_argument(
        "--script",
        action="append",
        default=[],
        metavar="NAME",
        help="add only pieces written in this script, as han, latin, cyrillic (default: all)",
    )
    merge.add_argument(
        "--text", action="append", default=[], metavar="PATH", help="text to report compression on"
    )
    merge.add_argument(
        "--sample-mb", type=positive_number, default=10.0, help="most text to report on, in MB"
    )
    add_corpus_options(merge, has_inputs=False)
    merge.add_argument("--overwrite", action="store_true", help="replace the tokenizer in the output folder")
    merge.set_defaults(command=_merge_tokenizers)


def _train_tokenizer(options: argparse.Namespace) -> None:
    from megallama.metrics.progress import progress_bar
    from megallama.tokenizers.training import train_tokenizer

    with progress_bar("sampling") as progress:
        path = train_tokenizer(
            options.inputs,
            options.output,
            vocab_size=options.vocab_size,
            model_type=options.model_type,
            character_coverage=options.character_coverage,
            split_digits=not options.no_split_digits,
            byte_fallback=not options.no_byte_fallback,
            normalization=options.normalization,
            user_symbols=options.user_symbol,
            seed=options.seed,
            sample_bytes=int(options.sample_mb * 1e6),
            suffixes=options.suffix,
            documents=documents_of(options),
            separator=options.separator,
            text_field=options.text_field,
            overwrite=options.overwrite,
            progress=progress,
            announce=lambda text: print(text, flush=True),
        )
    print(f"wrote {path} ({options.vocab_size} ids)")


def _merge_tokenizers(options: argparse.Namespace) -> None:
    from megallama.tokenizers.compression import compression_table, measure_compression, sample_text
    from megallama.tokenizers.load import load_tokenizer
    from megallama.tokenizers.merge import merge_tokenizers
    from megallama.tokenizers.training import check_model_output

    check_model_output(options.output, overwrite=options.overwrite)
    lines = []
    if options.text:  # first: a wrong path should not be found out after the merge
        lines = sample_text(
            options.text,
            sample_bytes=int(options.sample_mb * 1e6),
            seed=options.seed,
            suffixes=options.suffix,
            documents=documents_of(options),
            separator=options.separator,
            text_field=options.text_field,
        )
    report = merge_tokenizers(
        options.first,
        options.second,
        options.output,
        max_pieces=options.max_pieces,
        scripts=options.script,
        overwrite=options.overwrite,
    )
    print(
        f"wrote {report.path}: {report.old_size:,} ids as before, {report.new_size - report.old_size:,} added"
    )
    for reason, count in report.skipped.items():
        print(f"  left out: {count:,} {reason}")
    if report.unreachable:
        print(f"  {report.unreachable:,} added pieces are never met: the first model's merges go another way")
    if lines:
        counts = measure_compression(lines, [load_tokenizer(options.first), load_tokenizer(report.path)])
        print("tokens a character")
        print(compression_table(counts, ["before", "after"]))
        changed = counts["all"].changed_lines
        print(f"lines that do not decode to themselves: {changed[0]:,} before, {changed[1]:,} after")


def _inspect_tokenizer(options: argparse.Namespace) -> None:
    from megallama.tokenizers.inspection import SAMPLES, inspect_tokenizer
    from megallama.tokenizers.load import load_tokenizer

    print(inspect_tokenizer(load_tokenizer(options.tokenizer), tuple(options.text) or SAMPLES))
