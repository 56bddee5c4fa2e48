"""Planted bugs of composition are noticed by the covering set of layouts, and a clean tree raises no alarm."""

from __future__ import annotations

import pytest

from megallama.verify.layouts import parse_layouts
from megallama.verify.verify import Bench, check_layouts
from tests.matrix import base
from tests.mutations.planted import MUTATIONS

# Every pair of axes that a bug can need, in as few ranks as that takes; `tests/matrix.py` covers the pairs of all
# dimensions, this list is the part of it that one mutation after another can be run against.
LAYOUTS = parse_layouts(
    "tp=2,sp=true;tp=2;pp=2,zero=2,recompute=full;dp=2,zero=0;dp=2,zero=3;"
    "pp=2,ties=true,zero=1;pp=2,vp=2,zero=1;tp=2,pp=2,zero=1;tp=2,sp=true,dp=2,zero=2,mbs=2;"
    "cp=2;cp=2,data.reset_positions=true,pp=2;"
    "pp=2,vp=2,zero=2,zero.offload=true,zero.accumulate_micro_batches=3"
)

MISSABLE = 1
"""Bugs of the list that may go unnoticed."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    """One reference for each model of the layouts; `benches.verify(layout, before)`."""
    return Benches(tmp_path_factory.mktemp("bench"))


class Benches:
    def __init__(self, folder):
        self._benches = {}
        check_layouts(base(), LAYOUTS)
        for word in ("", "ties", "positions"):
            words = [w for w in ("ties", "positions") if w != word]
            group = [x for x in LAYOUTS if word in x.name and not any(w in x.name for w in words)]
            place = folder / f"bench-{word}"
            place.mkdir()
            bench = Bench(base(), group, steps=3, dtype="fp64", folder=place)
            self._benches |= {layout.name: bench for layout in group}

    def verify(self, layout, before=None):
        return self._benches[layout.name].verify(layout, before=before)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_clean_tree_raises_no_alarm(layout, benches):
    result = benches.verify(layout)
    assert result.is_equal, result


HINTS = {
    "_cp": "cp=2",
    "tied": "ties",
    "stage": "pp=2",
    "backward": "pp=2",
    "interleaved": "vp=2",
    "replica": "dp=2",
    "_dp": "dp=2",
    "host_memory": "offload",
    "local_sums": "accumulate",
}
"""Part of a bug's name, and of the layouts in which it should show; only the order of trying, to save time."""


def likeliest_first(name):
    parts = [part for word, part in HINTS.items() if word in name]
    return sorted(LAYOUTS, key=lambda layout: not any(part in layout.name for part in parts))


@pytest.mark.timeout(1800)
def test_the_planted_bugs_are_noticed(benches):
    noticed, causes = {}, []
    for name, plant in MUTATIONS.items():
        noticed[name] = None
        for layout in likeliest_first(name):
            result = benches.verify(layout, before=plant)
            if not result.is_equal:
                assert "TypeError" not in result.cause, (name, result.cause)  # the plant's own mistake
                noticed[name] = layout.name
                causes.append(f"{name}: {layout.name}: {result.cause}")
                break
    print("\n".join(causes))
    missed = [name for name, layout in noticed.items() if layout is None]
    assert len(noticed) >= 20 and len(missed) <= MISSABLE, missed


@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_no_planted_bug_shows_in_one_process(name, benches):
    """Else it would be none of composition, and a plain unit test would do."""
    (alone,) = parse_layouts("mbs=8")
    bench = benches._benches[LAYOUTS[0].name]
    assert bench.verify(alone, before=MUTATIONS[name]).is_equal
