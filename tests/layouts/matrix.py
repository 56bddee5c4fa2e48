"""The layouts that are proved equal to one process: all legal ones up to 8 ranks, and a covering set of them.

`python -m tests.layouts.matrix` runs the full matrix in fp64 (`--dtype fp32` likewise), `--at-least 120` a part of
it that has every pair of settings, `--covering` the covering set up to 4 ranks.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import sys
from collections.abc import Sequence
from typing import Any

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.host.ranks import start_forkserver
from megallama.verification.layouts import Layout, legal_layouts
from megallama.verification.report import header, name_width, row, summary
from megallama.verification.verify import verify

DIMENSIONS = {
    "train.recompute": ["none", "full", "selective"],
    "train.micro_batch_size": [1, 2],
    "model.tie_embeddings": [False, True],
    "data.reset_positions": [False, True],
}
"""Dimensions beside the axes of `parallel` and the ZeRO stage."""


@functools.cache
def base() -> RunConfig:
    """A run with grouped key/value heads, padded vocabulary, clipping and weight decay, of free sizes."""
    return load_config(
        [
            "model=llama_tiny",
            "model.num_layers=16",
            "model.num_heads=16",
            "model.num_kv_heads=8",
            "model.vocab_size=1001",
            "train.seq_len=64",
            "train.global_batch_size=64",
            "train.steps=5",
            "train.run_dir=.",
            "optim.lr=1e-3",
            "optim.warmup_steps=2",
            "data.sources=[tokens]",
        ]
    )


def full_matrix(max_ranks: int = 8) -> list[Layout]:
    """Every legal layout of the axes; the further dimensions take turns, out of step with each other."""
    layouts = legal_layouts(base(), max_ranks=max_ranks)
    turns = [itertools.cycle(_stretched(values, n)) for n, values in enumerate(DIMENSIONS.values())]
    rows = (dict(zip(DIMENSIONS, values, strict=True)) for values in zip(*turns, strict=True))
    return [_with(layout, row) for layout, row in zip(layouts, rows, strict=False)]  # the rows never end


def _stretched(values: Sequence[Any], times: int) -> list[Any]:
    """Each value several times over, so that the cycles of two dimensions do not run in parallel."""
    return [value for value in values for _ in range(times + 1)] + list(values[:1])


def _with(layout: Layout, further: dict[str, Any]) -> Layout:
    shown = ",".join(f"{key}={str(value).lower()}" for key, value in further.items())
    return dataclasses.replace(
        layout, name=f"{layout.name},{shown}", settings=layout.settings + tuple(further.items())
    )


def pairs_of(layout: Layout) -> set[tuple[Any, ...]]:
    """The pairs of values that a layout covers."""
    values = {**dict.fromkeys(_dimensions()), **dict(layout.settings), "dp": layout.dp}
    values = {key: str(value) for key, value in values.items()}
    return {(a, values[a], b, values[b]) for a, b in itertools.combinations(sorted(values), 2)}


@functools.cache
def _dimensions() -> list[str]:
    return sorted({key for layout in legal_layouts(base(), max_ranks=4) for key, _ in layout.settings})


def covering_set(layouts: Sequence[Layout]) -> list[Layout]:
    """Few layouts that have every pair of values which any of `layouts` has; greedily, small ones first."""
    ranks = {layout.name: _ranks(layout) for layout in layouts}
    covers = {
        layout.name: pairs_of(layout) for layout in sorted(layouts, key=lambda layout: ranks[layout.name])
    }
    by_name = {layout.name: layout for layout in layouts}
    wanted = set().union(*covers.values())
    chosen = []
    while wanted:
        best = max(covers, key=lambda name: len(covers[name] & wanted) - 0.01 * ranks[name])
        chosen.append(best)
        wanted -= covers.pop(best)
    return sorted((by_name[name] for name in chosen), key=lambda layout: ranks[layout.name])


def part_of_matrix(layouts: Sequence[Layout], *, at_least: int) -> list[Layout]:
    """Every pair of settings that `layouts` have, and others at even distances until there are `at_least`."""
    chosen = {layout.name for layout in covering_set(layouts)}
    others = [layout.name for layout in layouts if layout.name not in chosen]
    missing = min(max(0, at_least - len(chosen)), len(others))
    chosen |= {others[i * len(others) // missing] for i in range(missing)}
    return [layout for layout in layouts if layout.name in chosen]


def _ranks(layout: Layout) -> int:
    return layout.world_size(layout.apply(base()))


def covering() -> list[Layout]:
    """The covering set of the matrix up to 4 ranks, all combinations of the further dimensions allowed."""
    layouts = legal_layouts(base(), max_ranks=4)
    combinations = [
        dict(zip(DIMENSIONS, values, strict=True)) for values in itertools.product(*DIMENSIONS.values())
    ]
    return covering_set([_with(layout, further) for layout in layouts for further in combinations])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--covering", action="store_true")
    parser.add_argument("--at-least", type=int, default=None)
    parser.add_argument("--dtype", choices=["fp64", "fp32", "bf16"], default="fp64")
    parser.add_argument("--max-ranks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    layouts = covering() if options.covering else full_matrix(options.max_ranks)
    if options.at_least is not None:
        layouts = part_of_matrix(layouts, at_least=options.at_least)
    start_forkserver()
    print(f"{len(layouts)} layouts")
    width = name_width(layouts)
    print(header(name="matrix", steps=options.steps, dtype=options.dtype, width=width))
    results = []
    for result in verify(base(), layouts, steps=options.steps, dtype=options.dtype):
        results.append(result)
        print(row(result, width=width), flush=True)
    print(summary(results))
    return 0 if all(result.is_equal for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
