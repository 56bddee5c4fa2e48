"""Hydra's sweeper is still the one way to split the words of a sweep, and still private."""

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from megallama.compat.hydra import split_sweep


def test_a_sweep_is_every_combination():
    words = OverridesParser.create().parse_overrides(["a=1,2", "b=3", "c=4,5"])
    assert split_sweep(words) == [[f"a={a}", "b=3", f"c={c}"] for a in (1, 2) for c in (4, 5)]


def test_there_is_no_public_function_for_it():
    assert "_internal" in BasicSweeper.__module__
    assert not [name for name in dir(hydra) if "sweep" in name.lower() or "split" in name.lower()], "use it"
