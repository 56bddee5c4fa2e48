"""`megallama check`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megallama.commands.parser import Commands, whole_number


def add(commands: Commands) -> None:
    """Add `megallama check` to the command line."""
    check = commands.add_parser("check", help="check a run before it is started, as launch/train.py would")
    check.add_argument(
        "--world-size",
        type=whole_number(least=1),
        default=None,
        help="number of ranks; rules that need it are left out",
    )
    check.add_argument(
        "--config-dir", type=Path, default=None, help="a folder with model/ or exp/ of your own"
    )
    check.add_argument("overrides", nargs="*", help="what launch/train.py is given: +exp=... key=value ...")
    check.set_defaults(command=_check)


def _check(options: argparse.Namespace) -> None:
    from megallama.config.load import load_config
    from megallama.model.counts import count_parameters
    from megallama.preflight import check_run

    config = load_config(options.overrides, extra_conf_dir=options.config_dir)
    check_run(config, world_size=options.world_size)
    model, train = config.model, config.train
    tokens_per_step = train.global_batch_size * train.seq_len
    print(
        f"ok: {model.name}, {count_parameters(model, padded=True):,} parameters,"
        f" {train.steps:,} steps of {tokens_per_step:,} tokens = {train.steps * tokens_per_step / 1e9:.3g}B tokens"
    )
