#!/usr/bin/env python
"""Start a training run.

torchrun --nproc-per-node 8 launch/train.py +exp=llama2_7b parallel.tp=8 optim.lr=1e-4
python launch/train.py +exp=demo                                  one process
python launch/train.py --multirun +exp=demo optim.lr=1e-3,3e-3    runs one after another, in run_dir/0, ...
python launch/train.py +exp=demo --cfg job                        only show the settings
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import hydra

from megallama.config.jobs import load_jobs
from megallama.config.load import CONF_DIR, ROOT, hydra_words
from megallama.host.errors import EXIT_USER_ERROR, UserError
from megallama.host.launch import LaunchEnvironment, read_launch_environment, tell_libraries
from megallama.host.log import quiet_libraries
from megallama.preflight import check_runs

GRACE_S = 8.0
"""How long a rank leaves it to rank 0 to report: torchrun ends the ranks of a node when one has ended."""

STAGGER_S = 2.0
"""Between the ranks of a node, so that one message comes from a node on which rank 0 does not run."""


def main(arguments: Sequence[str]) -> int:
    """Run what the command line asks for; returns the exit code: 0, or 2 for what the user can mend."""
    environment = LaunchEnvironment()
    quiet_libraries()
    try:
        environment = read_launch_environment()
        options = _parser().parse_intermixed_args(arguments)
        if _only_shows(options):
            if environment.rank == 0:
                _show(arguments, options)
            return 0
        extra = Path(options.config_dir) if options.config_dir else None
        configs = load_jobs(options.overrides, is_multirun=options.multirun, extra_conf_dir=extra)
        check_runs(configs, world_size=environment.world_size)
        tell_libraries(environment, is_in_launch_order=any(config.parallel.tp > 1 for config in configs))
        # Only now: this import takes seconds, and a mistake in the command line should not.
        from megallama.train import run

        for index, config in enumerate(configs):
            if not run(config, environment=environment, job_index=index):
                break
    except UserError as error:
        _report(error, environment)
        return EXIT_USER_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    """Hydra's flags: what runs something is ours, what only shows something is passed on to Hydra."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--config-dir", "-cd")
    shows = parser.add_argument_group()
    shows.add_argument("--help", "-h", action="store_true")
    shows.add_argument("--hydra-help", action="store_true")
    shows.add_argument("--version", action="store_true")
    shows.add_argument("--cfg", "-c")
    shows.add_argument("--resolve", action="store_true")
    shows.add_argument("--package", "-p")
    shows.add_argument("--info", "-i", nargs="?", const="all")
    shows.add_argument("--shell-completion", "-sc", action="store_true")
    parser.error = _refuse  # type: ignore[method-assign, assignment]
    return parser


def _refuse(message: str) -> None:
    raise UserError(f"{message}: --help shows what can be given")


def _only_shows(options: argparse.Namespace) -> bool:
    flags = (
        options.help,
        options.hydra_help,
        options.version,
        options.cfg,
        options.info,
        options.shell_completion,
    )
    return any(flags)


def _show(arguments: Sequence[str], options: argparse.Namespace) -> None:
    extra = Path(options.config_dir) if options.config_dir else None
    words = hydra_words(options.overrides, conf_dir=CONF_DIR, extra_conf_dir=extra)
    flags = [argument for argument in arguments if argument not in options.overrides]
    sys.argv = [sys.argv[0], *words, *flags]

    @hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=ROOT)
    def nothing(config: object) -> None:
        """Hydra prints; there is nothing to run."""

    nothing()


def _report(error: UserError, environment: LaunchEnvironment) -> None:
    """Show one message. Rank 0 does; another rank only when rank 0 lives on, so met no error itself."""
    if environment.rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return
    time.sleep(GRACE_S + STAGGER_S * environment.local_rank)
    print(f"error on rank {environment.rank}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
