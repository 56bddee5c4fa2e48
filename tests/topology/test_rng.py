"""Random streams: equal where they must be, different everywhere else, and a function of the step."""

import itertools

import torch

from megallama.config.schema import ParallelConfig
from megallama.host.launch import read_launch_environment
from megallama.topology.connect import connect
from megallama.topology.rng import seed_streams, stream_seed
from tests.support.ranks import run_ranks


def draws(parallel):
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    with connect(parallel, environment=read_launch_environment()) as topology:
        numbers = {}
        for step in (0, 1, 0):
            seed_streams(topology, seed=5, step=step)
            shared = torch.rand(1).item()
            with get_cuda_rng_tracker().fork():
                own = torch.rand(1).item()
            assert numbers.setdefault(step, (shared, own)) == (shared, own), "not a function of the step"
        place = (topology.tp_rank, topology.dp_rank, topology.pp_rank)
        return place, numbers


def test_streams_differ_exactly_where_they_must():
    results = run_ranks(8, draws, ParallelConfig(tp=2, pp=2))
    assert sorted(place for place, _ in results) == sorted(itertools.product((0, 1), (0, 1), (0, 1)))
    shared = {}
    for (_, dp, pp), numbers in results:
        for step, (value, _) in numbers.items():
            assert shared.setdefault((dp, pp, step), value) == value, (
                "tensor ranks must share the default stream"
            )
    assert len(set(shared.values())) == len(shared) == 8
    own = [value for _, numbers in results for _, value in numbers.values()]
    assert len(set(own)) == len(own) == 16


def test_seeds_are_stable_and_do_not_collide():
    assert stream_seed(1, 2, 3) == 1517167407554927345, "streams must not change between versions or hosts"
    seeds = {stream_seed(*numbers) for numbers in itertools.product(range(12), repeat=3)}
    assert len(seeds) == 12**3 and all(0 <= seed < 2**63 for seed in seeds)
    assert stream_seed(1, 23) != stream_seed(12, 3)
