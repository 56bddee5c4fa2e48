"""`megallama check`: reports what is wrong with a run without starting it."""

from __future__ import annotations

import argparse

from megallama.commands.parser import Commands, whole_number
from megallama.config.words.command_line import CommandLine, add_run_words


def add(commands: Commands) -> None:
    """Add `megallama check` to the command line."""
    check = commands.add_parser("check", help="check a run before it is started, as megallama train would")
    check.add_argument(
        "--world-size",
        type=whole_number(least=1),
        default=None,
        help="number of ranks; rules that need it are left out",
    )
    add_run_words(check)
    check.set_defaults(command=_check)


def _check(options: argparse.Namespace) -> None:
    from megallama.model.counts import count_parameters
    from megallama.preflight import check_runs

    line = CommandLine.of(options)
    configs = line.load_sweep()[1] if line.is_multirun else line.load_runs()
    check_runs(configs, world_size=options.world_size)
    for config in configs:
        model, train = config.model, config.train
        tokens_per_step = train.global_batch_size * train.seq_len
        print(
            f"ok: {model.name}, {count_parameters(model, padded=True):,} parameters,"
            f" {train.steps:,} steps of {tokens_per_step:,} tokens = {train.steps * tokens_per_step / 1e9:.3g}B tokens"
        )
