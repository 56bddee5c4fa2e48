"""The console command `megallama`: dispatches to the subcommands."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from megallama.commands import (
    check,
    checkpoint,
    data,
    expand_vocab,
    export_model,
    generate,
    import_model,
    plot,
    prepare,
    tokenizer,
    train,
    verify,
)
from megallama.commands.parser import CommandParser
from megallama.host.errors import EXIT_USER_ERROR, UserError
from megallama.host.limits import raise_limit, user_error_of
from megallama.host.log import quiet_libraries
from megallama.host.utf8 import use_utf8
from megallama.host.version import version


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    0, 1 where a command looked for differences or damage and found some, 2 for something that the user can mend,
    130 for ctrl-c.
    """
    use_utf8()
    options = _parser().parse_args(arguments)
    quiet_libraries()
    raise_limit()
    try:
        return options.command(options) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, a closed pager) left; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:
        known = user_error_of(error)
        if known is None:
            raise
        print(f"error: {known}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megallama",
        description="Pretraining of LLaMA-family models. `megallama COMMAND --help` tells of each command.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=CommandParser)
    for command in (
        tokenizer,
        prepare,
        data,
        check,
        train,
        verify,
        generate,
        plot,
        checkpoint,
        import_model,
        export_model,
        expand_vocab,
    ):
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
