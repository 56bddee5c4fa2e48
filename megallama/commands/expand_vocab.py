"""`megallama expand-vocab`: adds rows for new tokens to a checkpoint."""

from __future__ import annotations

import argparse

from megallama.commands.parser import Commands, whole_number


def add(commands: Commands) -> None:
    """Add `megallama expand-vocab` to the command line."""
    expand = commands.add_parser(
        "expand-vocab", help="give a checkpoint rows for the tokens of a grown tokenizer"
    )
    expand.add_argument("source", help="checkpoint, or run folder (its newest intact checkpoint)")
    expand.add_argument("--output", required=True, help="folder that gets checkpoints/ and tokenizer/")
    expand.add_argument("--tokenizer", required=True, help="new tokenizer, which keeps every old id")
    expand.add_argument(
        "--old-tokenizer", default=None, help="tokenizer of the checkpoint (default: the run's)"
    )
    expand.add_argument(
        "--init",
        choices=["mean", "zeros", "normal"],
        default="mean",
        help="new rows: mean of the rows of the token's old pieces, zeros, or a draw like the old rows",
    )
    expand.add_argument("--seed", type=whole_number(least=0), default=1234, help="of --init normal")
    expand.set_defaults(command=_expand_vocab)


def _expand_vocab(options: argparse.Namespace) -> None:
    from megallama.expand_vocab import expand_vocab

    report = expand_vocab(
        options.source,
        options.output,
        tokenizer=options.tokenizer,
        old_tokenizer=options.old_tokenizer,
        init=options.init,
        seed=options.seed,
    )
    print(f"wrote {report.checkpoint}")
    print(f"  {report.old_vocab_size:,} ids as before, {report.new_vocab_size - report.old_vocab_size:,} new")
    print(f"  {report.rows[0]:,} rows became {report.rows[1]:,}, padding included")
    print(f"  a new token was {report.pieces_per_token:.1f} tokens on average")
    print("go on with")
    print(f"  train.init_from={options.output} model.vocab_size={report.new_vocab_size}")
    print(f"  data.tokenizer={report.tokenizer} and data prepared with it")
    print(
        f"  to train the new rows first: optim.partial_steps=N optim.partial_rows_from={report.old_vocab_size}"
    )
