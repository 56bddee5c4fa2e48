"""Dropout draws the same mask again on recomputation, and streams differ over ranks exactly where they must.

`verify` compares layouts with one process and so runs without dropout, which no two layouts draw alike. Here the masks
themselves are looked at, and bugs planted in the streams must be noticed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from megallama.config.load import load_config
from megallama.engine.build import build_run_engine
from megallama.host.launch import read_launch_environment
from megallama.topology.connect import connect
from tests.mutations.streams import STREAM_MUTATIONS
from tests.support.builders import loader_of
from tests.support.jobs import overrides
from tests.support.ranks import run_ranks

STEPS, MICRO_BATCHES = 2, 4

RECOMPUTE = "train.recompute=full"
EQUAL, APART = True, False

LAYOUTS = {
    "one rank": (1, [], None),
    "recompute": (1, [RECOMPUTE], None),
    "tp": (2, ["parallel.tp=2", RECOMPUTE], EQUAL),
    "tp sp": (2, ["parallel.tp=2", "parallel.sequence_parallel=true", RECOMPUTE], APART),
    "dp": (2, [], APART),
    "cp": (2, ["parallel.cp=2"], APART),
    "pp": (2, ["parallel.pp=2", RECOMPUTE], APART),
}
"""Ranks, words, and whether all ranks draw the same masks."""


def drawn(arguments: list[str], plant: Callable[[], None] | None) -> list[list[str]]:
    """Digests of the dropout masks of each step, in order; called in every rank."""
    if plant is not None:
        plant()
    steps: list[list[str]] = []
    original = torch.nn.functional.dropout

    def recording(
        x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        assert training
        mask = original(torch.ones_like(x), p=p, training=True)
        steps[-1].append(hashlib.blake2b(mask.contiguous().numpy().tobytes()).hexdigest())
        return x * mask

    torch.nn.functional.dropout = recording  # in a process of its own
    config = load_config(arguments)
    with connect(config.parallel, environment=read_launch_environment()) as topology:
        engine = build_run_engine(config, topology)
        loader = loader_of(config, topology)
        for step in range(STEPS):
            steps.append([])
            engine.train_step(step, loader.batches(step))
    return steps


def broken_rules(name: str, folder: Path, plant: Callable[[], None] | None = None) -> list[str]:
    world_size, words, is_equal = LAYOUTS[name]
    settings = [
        "model.hidden_dropout=0.2",
        "train.micro_batch_size=1",
        f"train.global_batch_size={MICRO_BATCHES}",
    ]
    ranks = run_ranks(world_size, partial(drawn, overrides(folder, *words, *settings), plant))
    broken = []
    for rank, steps in enumerate(ranks):
        assert all(steps), "nothing was dropped"
        for masks in steps:
            times = Counter(Counter(masks).values())
            if RECOMPUTE not in words:
                broken += [f"a mask twice on rank {rank}"] * (set(times) != {1})
                continue
            # That of the embedding stands before the layers and is not recomputed.
            embedded = MICRO_BATCHES if rank == 0 or "parallel.pp=2" not in words else 0
            broken += [f"other masks on recomputation on rank {rank}"] * (
                times[1] != embedded or max(times) > 2
            )
        broken += [f"two steps alike on rank {rank}"] * bool(set(steps[0]) & set(steps[1]))
    if is_equal is EQUAL and ranks[0] != ranks[1]:
        broken.append("ranks drew apart")
    if is_equal is APART and any(set(a) & set(b) for a, b in zip(*ranks, strict=True)):
        broken.append("ranks drew alike")
    return broken


@pytest.mark.parametrize("name", LAYOUTS)
def test_masks_are_as_they_must_be(name, tmp_path):
    assert broken_rules(name, tmp_path) == []


@pytest.mark.parametrize("bug", STREAM_MUTATIONS)
def test_a_bug_in_the_streams_is_noticed(bug, tmp_path):
    layout, rule, plant = STREAM_MUTATIONS[bug]
    assert rule in " ".join(broken_rules(layout, tmp_path, plant))
