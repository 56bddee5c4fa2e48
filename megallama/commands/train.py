"""`megallama train`."""

from __future__ import annotations

import argparse
import re

from megallama.commands.parser import Commands, whole_number
from megallama.config.command_line import CommandLine, add_run_words, add_shows

RANK = "megallama.entry"
"""Module that every rank runs."""

PASSED_ON = (
    "nnodes",
    "node_rank",
    "rdzv_endpoint",
    "rdzv_id",
    "rdzv_backend",
    "rdzv_conf",
    "local_addr",
    "max_restarts",
)
"""Options that torchrun knows by these names."""


def add(commands: Commands) -> None:
    """Add `megallama train` to the command line."""
    train = commands.add_parser(
        "train",
        help="train on this machine, or as one node of several",
        description="Checks the run, then starts a rank for each GPU, as torchrun would. The same command again goes on"
        " where the run stood.",
    )
    add_run_words(train)
    add_shows(train)
    ranks = train.add_argument_group("ranks", "The same command on every node of a job; torchrun's options.")
    ranks.add_argument(
        "--nproc-per-node",
        type=whole_number(least=1),
        default=None,
        metavar="N",
        help="ranks of this node (default: its GPUs, or 1)",
    )
    ranks.add_argument(
        "--nnodes", type=_nodes, default=None, metavar="N", help="nodes of the job, or MIN:MAX (default: 1)"
    )
    ranks.add_argument(
        "--rdzv-endpoint",
        default=None,
        metavar="HOST:PORT",
        help="where the nodes meet: a node and a free port",
    )
    ranks.add_argument(
        "--rdzv-id", default=None, metavar="NAME", help="name of the job, the same on every node"
    )
    ranks.add_argument(
        "--rdzv-backend",
        default=None,
        metavar="KIND",
        help="how they meet (torchrun's default; c10d is usual)",
    )
    ranks.add_argument("--rdzv-conf", default=None, metavar="KEY=VALUE,...", help="more on how they meet")
    ranks.add_argument(
        "--node-rank",
        type=whole_number(least=0),
        default=None,
        metavar="N",
        help="number of this node, with --rdzv-backend static",
    )
    ranks.add_argument(
        "--local-addr", default=None, metavar="HOST", help="name by which the others reach this node"
    )
    ranks.add_argument(
        "--max-restarts",
        type=whole_number(least=0),
        default=None,
        metavar="N",
        help="start the ranks anew up to N times after a failure (default: 0)",
    )
    train.set_defaults(command=_train)


def _nodes(text: str) -> str:
    """An argument that is N or MIN:MAX."""
    match = re.fullmatch(r"([1-9]\d{0,8})(?::([1-9]\d{0,8}))?", text)
    if match is None or (match[2] and int(match[1]) > int(match[2])):
        raise argparse.ArgumentTypeError(f"{text} must be a number of nodes above 0, or MIN:MAX")
    return text


def _train(options: argparse.Namespace) -> int:
    from megallama.host.torchrun import count_gpus, refuse_other_launcher, start_ranks
    from megallama.preflight import check_runs

    line = CommandLine.of(options)
    if line.shows:
        line.show()
        return 0
    least, _, most = (options.nnodes or "1").partition(":")
    is_one_node = max(int(least), int(most or least)) == 1
    refuse_other_launcher(is_one_node=is_one_node)
    configs = line.load_runs()
    ranks = options.nproc_per_node or count_gpus() or 1
    # An elastic job has the size with which its nodes happen to meet. Of several nodes rank 0 alone looks into files.
    world_size = None if most and most != least else int(least) * ranks
    check_runs(configs, world_size=world_size, reads_files=is_one_node)
    passed = [
        f"--{name.replace('_', '-')}={value}"
        for name in PASSED_ON
        if (value := getattr(options, name)) is not None
    ]
    return start_ranks(RANK, line.words, options=passed, ranks_per_node=ranks)
