"""Gloo ranks for tests, from a forkserver with the heavy packages already imported: a rank starts at once.

`run_ranks(4, function, argument)` calls `function(argument)` on four ranks of one fresh process group and
returns the four results in rank order. The function must be importable (module level) and its arguments
and result picklable. A failing rank fails the test with that rank's traceback.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

PRELOAD = ["torch", "torch.distributed", "deepspeed", "megallama.train"]
DEFAULT_TIMEOUT_S = 240.0

_context = multiprocessing.get_context("forkserver")


def start_forkserver() -> None:
    """Import the heavy packages once in the server; called by conftest before the first test."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _context.set_forkserver_preload(PRELOAD)


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
    )
    try:
        # Plain pickle copies tensors; the pipe's own would share their memory, which goes with the rank.
        pipe.send_bytes(pickle.dumps((True, function(*args))))
    except BaseException:  # noqa: BLE001 - the parent shows it
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        pipe.close()
    # Without this, interpreter shutdown waits for gloo threads of peers that already left.
    os._exit(0)


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = DEFAULT_TIMEOUT_S
) -> list[Any]:
    """Results of `function(*args)` on `world_size` ranks, in rank order; the launch environment is torchrun's.

    The function starts the process group itself (through `megallama.topology`, or torch.distributed).
    """
    port = free_port()
    pipes: list[Connection] = []
    processes = []
    for rank in range(world_size):
        receiver, sender = _context.Pipe(duplex=False)
        process = _context.Process(target=_rank_main, args=(rank, world_size, port, sender, function, args))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while len(results) < world_size:
            open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
            ready = wait(open_pipes, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(
                    f"ranks {sorted(set(range(world_size)) - set(results))} gave no result in {timeout_s} s"
                )
            for pipe in ready:
                rank = pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    ok, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    ok, value = (
                        False,
                        f"process ended without a result (exit code {processes[rank].exitcode})",
                    )
                if not ok:
                    raise AssertionError(f"rank {rank} of {world_size} failed:\n{value}")
                results[rank] = value
    finally:
        for process in processes:
            if process.is_alive() and len(results) < world_size:
                process.kill()
            process.join(timeout=30)
    return [results[rank] for rank in range(world_size)]
