"""The console command `megallama`: what is done before and after a training run."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from megallama.host.errors import EXIT_DIFFERENT, EXIT_USER_ERROR, UserError
from megallama.host.log import quiet_libraries


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    0, 1 where `verify` found a difference, 2 for something that the user can mend, 130 for ctrl-c.
    """
    options = _parser().parse_args(arguments)
    quiet_libraries()
    try:
        return options.command(options) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, a closed pager) left; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megallama",
        description="Pretraining of LLaMA-family models. Training itself: torchrun launch/train.py +exp=...",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_tokenizer(commands)
    _add_prepare(commands)
    _add_check(commands)
    _add_verify(commands)
    _add_generate(commands)
    _add_plot(commands)
    return parser


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _add_corpus_options(parser: argparse.ArgumentParser) -> None:
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


def _add_tokenizer(commands: Commands) -> None:
    tokenizer = commands.add_parser("tokenizer", help="train a tokenizer")
    actions = tokenizer.add_subparsers(metavar="ACTION", required=True)
    train = actions.add_parser("train", help="train a sentencepiece tokenizer with byte fallback")
    _add_corpus_options(train)
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


def _add_prepare(commands: Commands) -> None:
    prepare = commands.add_parser("prepare", help="tokenize text into datasets to train on")
    _add_corpus_options(prepare)
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


def _add_check(commands: Commands) -> None:
    check = commands.add_parser("check", help="check a run before it is started, as launch/train.py would")
    check.add_argument(
        "--world-size", type=int, default=None, help="number of ranks; rules that need it are left out"
    )
    check.add_argument("overrides", nargs="*", help="what launch/train.py is given: +exp=... key=value ...")
    check.set_defaults(command=_check)


def _check(options: argparse.Namespace) -> None:
    from megallama.config.load import load_config
    from megallama.model.counts import count_parameters
    from megallama.preflight import check_run

    config = load_config(options.overrides)
    check_run(config, world_size=options.world_size)
    model, train = config.model, config.train
    tokens_per_step = train.global_batch_size * train.seq_len
    print(
        f"ok: {model.name}, {count_parameters(model, padded=True):,} parameters,"
        f" {train.steps:,} steps of {tokens_per_step:,} tokens = {train.steps * tokens_per_step / 1e9:.3g}B tokens"
    )


def _add_verify(commands: Commands) -> None:
    verify = commands.add_parser(
        "verify", help="prove on this machine's CPU that layouts compute what one process computes"
    )
    verify.add_argument("overrides", nargs="*", help="what launch/train.py is given: +exp=... key=value ...")
    which = verify.add_mutually_exclusive_group()
    which.add_argument(
        "--layouts",
        metavar='"tp=2,pp=2;dp=4,zero=2"',
        help="layouts, apart by semicolons (default: the run's own axes, each cut down to 2)",
    )
    which.add_argument("--all", action="store_true", help="every layout that is legal for the run")
    verify.add_argument("--max-ranks", type=int, default=None, help="most ranks of --all (default: 4)")
    verify.add_argument("--steps", type=int, default=5, help="optimizer steps (default: 5)")
    verify.add_argument(
        "--dtype",
        choices=["fp64", "fp32", "bf16"],
        default="fp64",
        help="fp64 tells every bug from rounding; the others run training's own code (default: fp64)",
    )
    verify.add_argument("--traffic", action="store_true", help="show the bytes that each layout moves")
    verify.set_defaults(command=_verify)


def _verify(options: argparse.Namespace) -> int:
    from megallama.config.load import load_config
    from megallama.host.ranks import start_forkserver
    from megallama.verify.layouts import legal_layouts, parse_layouts
    from megallama.verify.report import LayoutResult, header, row, summary, traffic_rows
    from megallama.verify.verify import default_layouts, verify

    if options.max_ranks is not None and not options.all:
        raise UserError(
            f"--max-ranks ({options.max_ranks}) needs --all: layouts by name have their own ranks"
        )
    max_ranks = 4 if options.max_ranks is None else options.max_ranks
    if max_ranks < 1:
        raise UserError(f"--max-ranks ({max_ranks}) must be at least 1")
    config = load_config(options.overrides)
    if options.layouts is not None:
        layouts = parse_layouts(options.layouts)
    else:
        layouts = legal_layouts(config, max_ranks=max_ranks) if options.all else default_layouts(config)
    start_forkserver()
    results: list[LayoutResult] = []
    for result in verify(config, layouts, steps=options.steps, dtype=options.dtype):
        if not results:
            print(header(name=config.model.name, steps=options.steps, dtype=options.dtype))
        results.append(result)
        print(row(result), flush=True)
    if options.traffic:
        print("\n".join(traffic_rows(result) for result in results))
    print(summary(results))
    return 0 if all(result.is_equal for result in results) else EXIT_DIFFERENT


def _add_generate(commands: Commands) -> None:
    generate = commands.add_parser("generate", help="continue a prompt with the newest checkpoint of a run")
    generate.add_argument("run_dir", type=Path)
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=int, default=200)
    generate.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    generate.add_argument("--top-k", type=int, default=0, help="only the k likeliest tokens; 0: all")
    generate.add_argument(
        "--top-p", type=float, default=1.0, help="only the likeliest tokens of this total probability"
    )
    generate.add_argument("--seed", type=int, default=0)
    generate.set_defaults(command=_generate)


def _generate(options: argparse.Namespace) -> None:
    from megallama.generate import Sampling, generate

    sampling = Sampling(
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed
    )
    parts = generate(
        options.run_dir, options.prompt, max_new_tokens=options.max_new_tokens, sampling=sampling
    )
    first = next(parts, "")  # errors come before the prompt is shown
    print(options.prompt, end="")
    print(first, end="", flush=True)
    for part in parts:
        print(part, end="", flush=True)
    print()


def _add_plot(commands: Commands) -> None:
    plot = commands.add_parser("plot", help="draw the loss of a run")
    plot.add_argument("run_dir", type=Path)
    plot.add_argument("--output", type=Path, default=None, help="PNG file (default: RUN_DIR/loss.png)")
    plot.add_argument(
        "--unigram-perplexity", type=float, default=None, help="draw the level of guessing by frequency alone"
    )
    plot.set_defaults(command=_plot)


def _plot(options: argparse.Namespace) -> None:
    from megallama.metrics.plot import plot_loss

    output = options.output or options.run_dir / "loss.png"
    level = options.unigram_perplexity
    plot_loss(options.run_dir, output, unigram_loss=math.log(level) if level else None)
    print(f"wrote {output}")


if __name__ == "__main__":
    sys.exit(main())
