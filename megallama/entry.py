"""What every rank runs: from the words of a command line to a trained model, or to one message and exit code 2.

`megallama train` and `torchrun launch/train.py` start it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from megallama.commands.parser import CommandParser
from megallama.config.words.command_line import CommandLine, add_run_words, add_shows
from megallama.host.errors import EXIT_USER_ERROR, UserError
from megallama.host.launch import LaunchEnvironment, read_launch_environment, tell_libraries
from megallama.host.limits import raise_limit, user_error_of
from megallama.host.log import quiet_libraries
from megallama.host.utf8 import use_utf8
from megallama.preflight import check_job

if TYPE_CHECKING:
    from megallama.checkpoint.format.disk import Disk
    from megallama.trainer.hooks.base import Hook

GRACE_S = 8.0
"""How long a rank leaves it to rank 0 to report: torchrun ends the ranks of a node when one has ended."""

STAGGER_S = 2.0
"""Between the ranks of a node, so that one message comes from a node on which rank 0 does not run."""


def main(arguments: Sequence[str], *, hooks: Sequence[Hook] = (), disk: Disk | None = None) -> int:
    """Run what the command line asks for; returns the exit code: 0, or 2 for what the user can mend.

    A program of one's own may give every run `hooks` and a `disk`, as `Trainer.from_config` takes them.
    """
    environment = LaunchEnvironment()
    use_utf8()
    quiet_libraries()
    raise_limit()
    try:
        environment = read_launch_environment()
        line = CommandLine.of(_parser().parse_args(arguments))
        if line.shows:
            if environment.rank == 0:
                line.show()
            return 0
        configs = line.load_runs()
        check_job(configs, environment=environment, job="all")
        tell_libraries(environment, is_in_launch_order=any(config.parallel.tp > 1 for config in configs))
        # Only now: this import takes seconds, and a mistake in the command line should not.
        from megallama.train import Trainer

        for index, config in enumerate(configs):
            if not Trainer.from_config(
                config, hooks=hooks, disk=disk, environment=environment, job_index=index
            ).fit():
                break
    except (UserError, OSError) as error:
        known = user_error_of(error)
        if known is None:
            raise
        _report(known, environment)
        return EXIT_USER_ERROR
    return 0


class _Parser(CommandParser):
    """Its mistakes are told as those in the settings are: by rank 0, with the remedy."""

    def error(self, message: str) -> NoReturn:
        """One message."""
        raise UserError(f"{message}: --help shows what can be given")


def _parser() -> CommandParser:
    parser = _Parser(add_help=False)
    add_run_words(parser)
    add_shows(parser, settings=("--help", "-h"))
    return parser


def _report(error: UserError, environment: LaunchEnvironment) -> None:
    """Show one message. Rank 0 does; another rank only when rank 0 lives on, so met no error itself."""
    if environment.rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return
    time.sleep(GRACE_S + STAGGER_S * environment.local_rank)
    print(f"error on rank {environment.rank}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
