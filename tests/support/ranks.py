"""Gloo ranks for tests: `megallama.host.ranks` with failures as failed assertions.

`run_ranks(4, function, argument)` calls `function(argument)` on four ranks of one fresh process group and
returns the four results in rank order. The function must be importable (module level) and its arguments
and result picklable. A failing rank fails the test with that rank's traceback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megallama.host import ranks
from megallama.host.ranks import DEFAULT_TIMEOUT_S, start_forkserver

__all__ = ["run_ranks", "start_forkserver"]


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = DEFAULT_TIMEOUT_S
) -> list[Any]:
    """Results of `function(*args)` on `world_size` ranks, in rank order; the launch environment is torchrun's."""
    try:
        return ranks.run_ranks(world_size, function, *args, timeout_s=timeout_s)
    except ranks.RankFailedError as error:
        raise AssertionError(str(error)) from None
