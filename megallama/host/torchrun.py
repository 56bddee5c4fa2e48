"""Ranks of this node, started through torchrun's own API; where torchrun would show a report, one line."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megallama.host.errors import EXIT_USER_ERROR, UserError
from megallama.host.launch import is_under_torchrun, refuse_copies

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

EXIT_FAILED = 1
EXIT_SIGNAL = 128
"""Exit code of a program that a signal ended, less the signal's number."""


def count_gpus() -> int:
    """Visible GPUs of this machine."""
    _import_torch()
    import torch

    return torch.cuda.device_count()


def _import_torch() -> None:
    """Import torch in this process, which starts ranks, so that its C++ code logs no stack traces here.

    It reads the variable at its import; the ranks do not inherit it.
    """
    if "TORCH_CPP_LOG_LEVEL" in os.environ or "LOGLEVEL" in os.environ:
        return
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
    try:
        import torch  # noqa: F401
    finally:
        del os.environ["TORCH_CPP_LOG_LEVEL"]


def start_ranks(module: str, arguments: Sequence[str], *, options: Sequence[str], ranks_per_node: int) -> int:
    """Run `python -m module arguments` as every rank of this node; returns when all have ended.

    SIGTERM and SIGINT go to the ranks, which have TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds to end.

    Args:
        module: What a rank runs.
        arguments: Its command line.
        options: torchrun's, e.g. ["--nnodes=2", "--rdzv-endpoint=node1:29500"].
        ranks_per_node: Ranks of this node.

    Returns:
        Exit code: 0, 2 after an error of the user's that a rank has told, 1 after another failure, 128 and the number
        of a signal that ended the job.

    Raises:
        UserError: torchrun refuses the options, or the nodes do not find each other.
    """
    _import_torch()
    from torch.distributed import DistError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    # torchrun sets 1, with a warning in a frame of stars.
    threads = max(1, len(os.sched_getaffinity(0)) // ranks_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    try:
        # A rank writes to the same streams as this process.
        with _quiet():
            torchrun.run(
                torchrun.parse_args(
                    [f"--nproc-per-node={ranks_per_node}", *options, "--module", module, *arguments]
                )
            )
    except ChildFailedError as error:
        return _exit_code(error.failures)
    except SignalException as error:
        number = signal.Signals(error.sigval)
        print(f"ended by {number.name}", file=sys.stderr)
        return EXIT_SIGNAL + number
    except (RendezvousError, DistError, ValueError, AssertionError) as error:
        shown = " ".join([str(error), f"({error.__cause__})" if error.__cause__ else ""]).strip()
        raise UserError(
            f"the nodes cannot meet ({' '.join(options) or 'one node'}: {shown}): check these options, that they are"
            " the same on every node, and that the endpoint is a host and a free port which every node reaches"
        ) from error
    return 0


def refuse_other_launcher(*, is_one_node: bool) -> None:
    """Ranks that start ranks: each rank would be a whole job.

    Raises:
        UserError: torchrun started this process; or another launcher did, many times over, for a job of one node.
    """
    if is_under_torchrun():
        raise UserError(
            "megallama train starts the ranks itself, but torchrun started this process: start it without torchrun,"
            " or give torchrun launch/train.py"
        )
    if not is_one_node:
        return
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        node = os.environ.get("RANK", "<number of this machine, from 0>")
        host = os.environ.get("MASTER_ADDR", "<first machine>")
        port = os.environ.get("MASTER_PORT", "<port>")
        raise UserError(
            f"megallama train starts the ranks itself, but WORLD_SIZE ({size}) says that this machine is one of several"
            " (nobody sets it for a single one): if each of them is to start its ranks, give"
            f" --nnodes={size} --node-rank={node} --rdzv-backend=static --rdzv-endpoint={host}:{port}; if this process"
            " is to be one rank, let the launcher start launch/train.py; for a run on this machine alone, unset"
            " WORLD_SIZE and RANK"
        )
    refuse_copies()


def preset(name: str) -> str | None:
    """What the surroundings say of torchrun's option `name`: PET_NNODES of `nnodes`, as torchrun itself reads it.

    Kubeflow's training operator sets such variables in every pod. Of "auto" and "gpu" ranks there are as many as GPUs,
    which is what no answer means.
    """
    value = os.environ.get(f"PET_{name.upper()}")
    return None if value in ("", "auto", "gpu") else value


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torchrun's log of what it does with its processes, unless LOGLEVEL asks for it."""
    before = logging.root.manager.disable
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _exit_code(failures: dict[int, ProcessFailure]) -> int:
    """The exit code of the job, from those of the ranks that failed by themselves."""
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    # A rank that torchrun ended because another one had failed is among these only if it was slow to end.
    codes = {rank: code for rank, code in codes.items() if code != -signal.SIGTERM} or codes
    others = {rank: code for rank, code in codes.items() if code != EXIT_USER_ERROR}
    if not others:
        return EXIT_USER_ERROR
    # A crash takes its peers with it, in any order; all have shown what they met.
    rank, code = min(others.items())
    how = f"ended with exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
    print(
        f"error: rank {rank} {how}; what it said stands above and in log/ of the run folder", file=sys.stderr
    )
    return EXIT_FAILED
