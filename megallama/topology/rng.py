"""Random streams as a pure function of seed, step and coordinates, so that a resumed run draws the same numbers."""

from __future__ import annotations

import hashlib

import torch

from megallama.topology.groups import Topology


def seed_streams(topology: Topology, *, seed: int, step: int) -> None:
    """Set every random stream of this rank for `step`.

    Ranks of one tp group share the default stream (their activations outside tensor-parallel regions are
    copies) and differ in megatron-core's model-parallel stream. dp, cp and pp ranks differ in both.
    """
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, initialize_rng_tracker

    shared = stream_seed(seed, step, topology.dp_rank, topology.cp_rank, topology.pp_rank)
    own = stream_seed(seed, step, topology.dp_rank, topology.cp_rank, topology.pp_rank, 1 + topology.tp_rank)
    torch.manual_seed(shared)
    initialize_rng_tracker()
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("model-parallel-rng", own)


def stream_seed(*numbers: int) -> int:
    """A 63-bit seed that differs wherever one of `numbers` differs."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
