"""What of Hydra is private. Read in Hydra 1.3.2 and 1.3.8; `tests/compat/test_hydra.py` says what can go."""

from __future__ import annotations

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper


def split_sweep(overrides: list[Any]) -> list[list[str]]:
    """The words of each run of a sweep. Hydra's sweeper can do it, but is made to start the runs as well."""
    (jobs,) = BasicSweeper.split_arguments(overrides, None)
    return [list(words) for words in jobs]
