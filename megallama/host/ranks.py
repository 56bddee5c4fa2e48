"""Runs the ranks of a job as local processes, without torchrun: for `megallama verify` and the tests.

They are forked from a server that has imported the heavy packages once, so a rank starts at once.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import TCPStore

DEFAULT_TIMEOUT_S = 240.0

PRELOAD = (
    "megallama.host.preload",
    *("torch", "torch.distributed", "deepspeed", "megallama.train", "megallama.verification.job"),
    # What DeepSpeed imports only when an engine is built: nearly half of the time of a small job.
    *(
        "deepspeed.module_inject.auto_ep_layer",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "deepspeed.comm.mori",
    ),
)

_context = multiprocessing.get_context("forkserver")


class RankFailedError(RuntimeError):
    """A rank raised or died; the text holds its traceback."""


def start_forkserver(preload: Sequence[str] = PRELOAD) -> None:
    """Say what the server imports; one compute thread a rank, since many ranks share the cores. Before any rank."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # On the CPU also where there are GPUs: these may be fewer than the ranks.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["DS_ACCELERATOR"] = "cpu"
    # Of optional packages that are absent, and of names that torch will rename: in every rank.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning,ignore::FutureWarning")
    _context.set_forkserver_preload(list(preload))


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> list[Any]:
    """Results of `function(*args)` on `world_size` processes, in rank order; their environment is torchrun's.

    The function starts the process group itself. It must be importable, arguments and result picklable.

    Raises:
        RankFailedError: a rank raised or ended without a result; the others are ended.
        TimeoutError: ranks without a result after `timeout_s` seconds.
    """
    store = _rendezvous_store()
    pipes: dict[Connection, int] = {}
    processes = []
    results: dict[int, Any] = {}
    try:
        for rank in range(world_size):
            receiver, sender = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_rank_main, args=(rank, world_size, store.port, sender, function, args)
            )
            process.start()
            sender.close()
            pipes[receiver] = rank
            processes.append(process)
        deadline = time.monotonic() + timeout_s
        while pipes:
            ready = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {sorted(pipes.values())} gave no result in {timeout_s} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = pipes.pop(pipe)
                results[rank] = _result(pipe, rank, world_size)
    finally:
        for process in processes:
            if process.is_alive() and len(results) < world_size:
                process.kill()
            process.join(timeout=30)
    return [results[rank] for rank in range(world_size)]


def _rendezvous_store() -> TCPStore:
    """Where the ranks meet. It lives here, as torchrun's does in torchrun: no port is chosen before it is taken."""
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _result(pipe: Connection, rank: int, world_size: int) -> Any:
    try:
        is_ok, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        is_ok, value = False, "the process ended without a result"
    if not is_ok:
        raise RankFailedError(f"rank {rank} of {world_size} failed:\n{value}")
    return value


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    pipe: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # rank 0 need not open one
        TORCH_GLOO_LAZY_INIT="1",  # most pairs of ranks never speak
    )
    # The libraries that the server loaded are no garbage. DeepSpeed collects when it shards a model for ZeRO 3; to look
    # through them then takes longer than all steps of a small job.
    gc.freeze()
    try:
        # Plain pickle copies tensors; the pipe's own would share their memory, which goes with the rank.
        pipe.send_bytes(pickle.dumps((True, function(*args))))
    except BaseException:  # noqa: BLE001 - the parent shows it
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        pipe.close()
    # Without this, interpreter shutdown waits for gloo threads of peers that already left.
    os._exit(0)
