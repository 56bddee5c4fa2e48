"""Bugs of composition, planted in the ranks of a layout to see whether `verify` notices.

Each is of a kind that has happened: those that parallel training is known for, and those collected for Megatron-LM in
its issue 7452. A parameter is left out of the norm or counted twice. A reduction is missing or runs over the wrong
group. A scale has the wrong size, a slice is that of another rank, a copy is stale. None shows in one process with one
micro-batch, so no test without ranks could find it; `test_mutations.py` proves that too.

A mutation patches modules in the process of a rank, before the model is built.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

MUTATIONS: dict[str, Callable[[], None]] = {}
"""By name; each function patches this process."""

SHOWS_IN: dict[str, str] = {}
"""By name: a layout of `tests/mutations/test_mutations.py` in which the bug shows."""


def mutation(layout: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(function: Callable[[], None]) -> Callable[[], None]:
        MUTATIONS[function.__name__] = function
        SHOWS_IN[function.__name__] = layout
        return function

    return register


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace `owner.name` by `around(original, ...)`."""
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(functools.partial(around, original)))


def wrap_method(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by `around(original, self, ...)`."""
    original = getattr(owner, name)
    setattr(owner, name, lambda self, *args, **kwargs: around(original, self, *args, **kwargs))


def sizes() -> Any:
    """megatron-core's parallel_state: places and sizes of this rank, once connected."""
    from megatron.core import parallel_state

    return parallel_state


def scale_loss(factor: Callable[[dict[str, Any], Any], float]) -> None:
    import megallama.engine.build as build

    def around(schedule: Any, stage: Any, batches: Any, **kwargs: Any) -> Any:
        if not kwargs["forward_only"]:
            kwargs["loss_factor"] *= factor(kwargs, batches)
        return schedule(stage, batches, **kwargs)

    wrap(build, "run_schedule", around)
