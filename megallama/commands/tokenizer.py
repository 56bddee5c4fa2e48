"""`megallama tokenizer`."""

from __future__ import annotations

import argparse

from megallama.commands.parser import Commands, add_corpus_options


def add(commands: Commands) -> None:
    """Add `megallama tokenizer` to the command line."""
    tokenizer = commands.add_parser("tokenizer", help="train a tokenizer")
    actions = tokenizer.add_subparsers(metavar="ACTION", required=True)
    train = actions.add_parser("train", help="train a sentencepiece tokenizer with byte fallback")
    add_corpus_options(train)
    train.add_argument("--output", required=True, help="folder that gets tokenizer.model")
    train.add_argument("--vocab-size", type=int, required=True, help="number of token ids, bytes included")
    train.add_argument("--model-type", choices=["bpe", "unigram"], default="bpe")
    train.add_argument(
        "--character-coverage", type=float, default=0.9995, help="share of characters with ids"
    )
    train.add_argument("--sample-mb", type=float, default=100.0, help="most text to train on, in MB")
    train.set_defaults(command=_train_tokenizer)


def _train_tokenizer(options: argparse.Namespace) -> None:
    from megallama.data.tokenizer_training import train_tokenizer

    path = train_tokenizer(
        options.inputs,
        options.output,
        vocab_size=options.vocab_size,
        model_type=options.model_type,
        character_coverage=options.character_coverage,
        seed=options.seed,
        sample_bytes=int(options.sample_mb * 1e6),
        suffixes=options.suffix,
        documents=options.documents,
        text_field=options.text_field,
    )
    print(f"wrote {path} ({options.vocab_size} ids)")
