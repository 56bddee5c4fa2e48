"""Random streams: bugs that show where dropout draws its masks (tests/layouts/test_dropout.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tests.mutations.registry import sizes, wrap


def recomputation_draws_anew() -> None:
    import megatron.core.tensor_parallel.random as random

    random._set_all_rng_states = lambda *states: None


def streams_forget(place: int) -> None:
    """The seed of a stream is (seed, step, dp, cp, pp, 1 + tp): leave one of them out."""
    import megallama.topology.rng as rng

    def around(seed_of: Any, *numbers: int) -> int:
        return int(seed_of(*(number for index, number in enumerate(numbers) if index != place)))

    wrap(rng, "stream_seed", around)


def tp_ranks_draw_copies_apart() -> None:
    import megallama.engine.build as build

    def around(seed_streams: Any, topology: Any, **kwargs: Any) -> None:
        seed_streams(topology, **kwargs)
        torch.manual_seed(torch.initial_seed() + sizes().get_tensor_model_parallel_rank())

    wrap(build, "seed_streams", around)


STREAM_MUTATIONS: dict[str, tuple[str, str, Callable[[], None]]] = {
    "recomputation_draws_anew": ("recompute", "other masks on recomputation", recomputation_draws_anew),
    "every_step_draws_the_same": ("one rank", "two steps alike", partial(streams_forget, 1)),
    "replicas_draw_the_same": ("dp", "ranks drew alike", partial(streams_forget, 2)),
    "cp_ranks_draw_the_same": ("cp", "ranks drew alike", partial(streams_forget, 3)),
    "stages_draw_the_same": ("pp", "ranks drew alike", partial(streams_forget, 4)),
    "sequence_parallel_parts_draw_the_same": ("tp sp", "ranks drew alike", partial(streams_forget, 5)),
    "tp_ranks_draw_copies_apart": ("tp", "ranks drew apart", tp_ranks_draw_copies_apart),
}
"""By name: a layout of `tests/layouts/test_dropout.py`, the rule that is broken there, and what patches the process."""
