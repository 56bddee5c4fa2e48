"""`megallama train`."""

from __future__ import annotations

import argparse
import re
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megallama.commands.parser import Commands, whole_number
from megallama.config.words.command_line import CommandLine, add_run_words, add_shows
from megallama.host.errors import UserError

if TYPE_CHECKING:
    from megallama.config.schema import RunConfig

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

LAUNCHERS_HERE = ("basic", "joblib")
"""Hydra's launchers that start runs on this machine."""


def add(commands: Commands) -> None:
    """Add `megallama train` to the command line."""
    from megallama.host.torchrun import preset

    train = commands.add_parser(
        "train",
        help="train on this machine, or as one node of several",
        description="Checks the run, then starts a rank for each GPU, as torchrun would. The same command again goes on"
        " where the run stood.",
    )
    add_run_words(train)
    add_shows(train)
    ranks = train.add_argument_group(
        "ranks",
        "The same command on every node of a job; torchrun's options, and its variables PET_NNODES and so on.",
    )
    ranks.add_argument(
        "--nproc-per-node",
        type=whole_number(least=1),
        default=preset("nproc_per_node"),
        metavar="N",
        help="ranks of this node (default: its GPUs, or 1)",
    )
    ranks.add_argument(
        "--nnodes",
        type=_nodes,
        default=preset("nnodes"),
        metavar="N",
        help="nodes of the job, or MIN:MAX (default: 1)",
    )
    ranks.add_argument(
        "--rdzv-endpoint",
        default=preset("rdzv_endpoint"),
        metavar="HOST:PORT",
        help="where the nodes meet: a node and a free port",
    )
    ranks.add_argument(
        "--rdzv-id", default=preset("rdzv_id"), metavar="NAME", help="name of the job, the same on every node"
    )
    ranks.add_argument(
        "--rdzv-backend",
        default=preset("rdzv_backend"),
        metavar="KIND",
        help="how they meet (torchrun's default; c10d is usual)",
    )
    ranks.add_argument(
        "--rdzv-conf", default=preset("rdzv_conf"), metavar="KEY=VALUE,...", help="more on how they meet"
    )
    ranks.add_argument(
        "--node-rank",
        type=whole_number(least=0),
        default=preset("node_rank"),
        metavar="N",
        help="number of this node, with --rdzv-backend static",
    )
    ranks.add_argument(
        "--local-addr",
        default=preset("local_addr"),
        metavar="HOST",
        help="name by which the others reach this node",
    )
    ranks.add_argument(
        "--max-restarts",
        type=whole_number(least=0),
        default=preset("max_restarts"),
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
    passed = tuple(
        f"--{name.replace('_', '-')}={value}"
        for name in PASSED_ON
        if (value := getattr(options, name)) is not None
    )
    if line.is_multirun and is_one_node:
        return _sweep(line, _Job(options.nproc_per_node, passed, line.config_dir))
    configs = line.load_runs()
    ranks = options.nproc_per_node or count_gpus() or 1
    # An elastic job has the size with which its nodes happen to meet. Of several nodes rank 0 alone looks into files.
    world_size = None if most and most != least else int(least) * ranks
    check_runs(configs, world_size=world_size, reads_files=is_one_node)
    return start_ranks(RANK, line.words, options=passed, ranks_per_node=ranks)


def _sweep(line: CommandLine, job: _Job) -> int:
    from megallama.config.words.sweep import run_sweep
    from megallama.host.torchrun import count_gpus
    from megallama.preflight import check_runs

    sweep, configs = line.load_sweep()
    # Other launchers may start the runs where there are other GPUs than here.
    world_size = job.num_ranks if sweep.launcher in LAUNCHERS_HERE else job.ranks
    check_runs(configs, world_size=world_size)
    if sweep.is_chosen:
        _check_choosable(configs[0])
    if sweep.runs_at_once < 0 and count_gpus():
        raise UserError(
            f"hydra.launcher.n_jobs ({sweep.runs_at_once}) would start as many runs at once as there are cores, on the"
            " same GPUs: set hydra.launcher.n_jobs to the number of runs that these GPUs hold"
        )
    try:
        run_sweep(sweep, job)
    except RanksFailedError as failure:
        return failure.code
    except (UserError, JobFaultError):
        raise
    except Exception as error:  # plugins raise classes of their own
        raise UserError(
            f"hydra/launcher={sweep.launcher} or the sweeper cannot go on ({type(error).__name__}:"
            f" {' '.join(str(error).split())[:300]}): correct its settings"
        ) from error
    return 0


def _check_choosable(first: RunConfig) -> None:
    """Values that a sweeper chooses are of this sweep, and have a loss to be chosen by."""
    held_out = any(source.validation_fraction for source in first.data.all_sources())
    if not (first.data.validation or held_out):
        raise UserError(
            "the sweeper chooses settings by the validation loss, and the run has no validation data: set"
            " data.validation, or validation_fraction of a source"
        )
    if Path(first.train.run_dir).exists():
        raise UserError(
            f"{first.train.run_dir} is there already, and a sweeper that chooses settings would go on with its run"
            " under others: choose another hydra.sweep.dir (by default train.run_dir)"
        )


class RanksFailedError(Exception):
    """The ranks of a job have told what went wrong; `code` is the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class JobFaultError(Exception):
    """A fault of this program within a job, with its traceback."""


@dataclass(frozen=True)
class _Job:
    """One run of a sweep, with ranks of its own. Hydra's launchers pickle it and call it in a process of theirs."""

    ranks: int | None
    """Ranks, where the command says how many."""
    options: tuple[str, ...]
    """torchrun's."""
    config_dir: Path | None
    """The user's own folder of configuration files."""

    @property
    def num_ranks(self) -> int:
        """Ranks on this machine."""
        from megallama.host.torchrun import count_gpus

        return self.ranks or count_gpus() or 1

    def __call__(self, words: list[str]) -> float | None:
        """Train; the last validation loss, if there is one."""
        try:
            return self._train(words)
        except (RanksFailedError, UserError):
            raise
        except Exception as error:
            raise JobFaultError(traceback.format_exc()) from error

    def _train(self, words: list[str]) -> float | None:
        from megallama.config.load import load_config
        from megallama.host.torchrun import EXIT_SIGNAL, start_ranks
        from megallama.preflight import check_run

        config = load_config(words, extra_conf_dir=self.config_dir)
        check_run(config, world_size=self.num_ranks)
        line = CommandLine(words, config_dir=self.config_dir)
        code = start_ranks(RANK, line.words, options=self.options, ranks_per_node=self.num_ranks)
        if code > EXIT_SIGNAL:
            raise SystemExit(code)  # a launcher would go on with the next run after an error
        if code:
            raise RanksFailedError(code)
        return last_validation_loss(Path(config.train.run_dir))


def last_validation_loss(run_dir: Path) -> float | None:
    """What the newest evaluation of a run found; None without one."""
    from megallama.metrics.jsonl import METRICS_FILE, load_metrics

    rows = load_metrics(run_dir / METRICS_FILE)
    return next((row["eval/loss"] for row in reversed(rows) if "eval/loss" in row), None)
