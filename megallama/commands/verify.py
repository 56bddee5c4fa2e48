"""`megallama verify`: compares layouts with one process."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megallama.commands.parser import Commands, whole_number
from megallama.config.words.command_line import CommandLine, add_run_words
from megallama.host.errors import EXIT_DIFFERENT, UserError

if TYPE_CHECKING:
    from megallama.config.schema import RunConfig


def add(commands: Commands) -> None:
    """Add `megallama verify` to the command line."""
    verify = commands.add_parser(
        "verify", help="prove on this machine's CPU that layouts compute what one process computes"
    )
    add_run_words(verify)
    which = verify.add_mutually_exclusive_group()
    which.add_argument(
        "--layouts",
        metavar='"tp=2,pp=2;dp=4,zero=2"',
        help="layouts, apart by semicolons (default: the run's own axes, each cut down to 2)",
    )
    which.add_argument("--all", action="store_true", help="every layout that is legal for the run")
    verify.add_argument(
        "--max-ranks", type=whole_number(least=1), default=None, help="most ranks of --all (default: 4)"
    )
    verify.add_argument("--steps", type=whole_number(least=1), default=5, help="optimizer steps (default: 5)")
    verify.add_argument(
        "--dtype",
        choices=["fp64", "fp32", "bf16"],
        default="fp64",
        help="fp64 tells every bug from rounding; the others run training's own code (default: fp64)",
    )
    verify.add_argument("--traffic", action="store_true", help="show the bytes that each layout moves")
    verify.set_defaults(command=_verify)


def _verify(options: argparse.Namespace) -> int:
    from megallama.host.ranks import start_forkserver

    if options.max_ranks is not None and not options.all:
        raise UserError(
            f"--max-ranks ({options.max_ranks}) needs --all: layouts by name have their own ranks"
        )
    max_ranks = 4 if options.max_ranks is None else options.max_ranks
    configs = CommandLine.of(options).load_runs()
    start_forkserver()
    are_equal = [_verify_run(config, options, max_ranks=max_ranks) for config in configs]
    return 0 if all(are_equal) else EXIT_DIFFERENT


def _verify_run(config: RunConfig, options: argparse.Namespace, *, max_ranks: int) -> bool:
    from megallama.verification.layouts import legal_layouts, parse_layouts
    from megallama.verification.report import LayoutResult, header, name_width, row, summary, traffic_rows
    from megallama.verification.verify import default_layouts, verify

    if options.layouts is not None:
        layouts = parse_layouts(options.layouts)
    else:
        layouts = legal_layouts(config, max_ranks=max_ranks) if options.all else default_layouts(config)
    width = name_width(layouts)
    results: list[LayoutResult] = []
    for result in verify(config, layouts, steps=options.steps, dtype=options.dtype):
        if not results:
            print(header(name=config.model.name, steps=options.steps, dtype=options.dtype, width=width))
        results.append(result)
        print(row(result, width=width), flush=True)
    if options.traffic:
        print("\n".join(traffic_rows(result) for result in results))
    print(summary(results))
    return all(result.is_equal for result in results)
