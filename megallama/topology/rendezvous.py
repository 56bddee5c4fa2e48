"""Where the ranks of a job meet before they have process groups, and what rank 0 tells the others there."""

from __future__ import annotations

import pickle
import time
from collections import Counter
from datetime import timedelta

import torch.distributed as dist

from megallama.host.launch import LaunchEnvironment
from megallama.topology.agreement import portable

TIMEOUT = timedelta(minutes=30)

_POLL_S = 0.05

_meetings: Counter[str] = Counter()
"""How often this process has met the others under each name, which is as often on every rank."""

_stores: list[dist.Store] = []
"""The last one: rank 0 may serve it itself, and would end it with the last reference."""


def meet(environment: LaunchEnvironment, *, job: str) -> dist.Store:
    """A store that the ranks of a job share; other jobs of the same processes, and later ones of this name, do not.

    Every rank calls it equally often for each name.
    """
    store: dist.Store = dist.HashStore()  # one rank needs no address and no port
    if environment.world_size > 1:
        store, _, _ = next(
            dist.rendezvous("env://", environment.rank, environment.world_size, timeout=TIMEOUT)
        )
        _stores[:] = [store]
    _meetings[job] += 1
    return dist.PrefixStore(f"megallama/{job}/{_meetings[job]}", store)


def tell(error: Exception | None, *, environment: LaunchEnvironment, job: str, patience_s: float) -> None:
    """What rank 0 found, for `hear` on the others. With an error it waits a while until all have heard it.

    Its end may be the end of the store, or of all ranks of its node.
    """
    store = meet(environment, job=job)
    store.set("word", pickle.dumps(None if error is None else portable(error)).hex())
    until = time.monotonic() + patience_s
    while error is not None and time.monotonic() < until:
        if store.add("heard", 0) == environment.world_size - 1:
            break
        time.sleep(_POLL_S)


def hear(*, environment: LaunchEnvironment, job: str, patience_s: float | None = None) -> None:
    """Wait for what rank 0 has to tell.

    Args:
        environment: This rank.
        job: As rank 0 names it.
        patience_s: Do without it after so many seconds; None waits as long as for any other rank.

    Raises:
        UserError: rank 0 found this.
        CheckpointError: rank 0 failed.
    """
    store = meet(environment, job=job)
    until = None if patience_s is None else time.monotonic() + patience_s
    while until is not None and not store.check(["word"]):
        if time.monotonic() >= until:
            return
        time.sleep(_POLL_S)
    word = pickle.loads(bytes.fromhex(store.get("word").decode()))
    store.add("heard", 1)
    if word is not None:
        raise word
