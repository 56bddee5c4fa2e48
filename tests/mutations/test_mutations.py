"""Planted bugs of composition are noticed by the covering set of layouts, and a clean tree raises no alarm."""

from __future__ import annotations

import pytest

from megallama.verification.layouts import parse_layouts
from megallama.verification.verify import Bench, check_layouts
from tests.layouts.matrix import base
from tests.mutations.planted import MUTATIONS, SHOWS_IN

# Every pair of axes that a bug can need, in as few ranks as that takes; `tests/layouts/matrix.py` covers the pairs
# of all dimensions, this list is the part of it that one mutation after another can be run against.
LAYOUTS = parse_layouts(
    "tp=2,sp=true;tp=2;pp=2,zero=2,recompute=full;dp=2,zero=0;dp=2,zero=3;"
    "pp=2,ties=true,zero=1;pp=2,vp=2,zero=1;tp=2,pp=2,zero=1;tp=2,sp=true,dp=2,zero=2,mbs=2;"
    "cp=2;cp=2,data.reset_positions=true,pp=2;"
    "pp=2,vp=2,zero=2,zero.offload=true,zero.accumulate_micro_batches=3;"
    "cp=2,cp_kind=ring,zero=0;cp=2,cp_kind=ulysses;tp=2,model.qk_norm=true,model.qkv_bias=true"
)
BY_NAME = {layout.name: layout for layout in LAYOUTS}

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    """One reference for each model of the layouts; `benches.verify(layout, before)`."""
    return Benches(tmp_path_factory.mktemp("bench"))


class Benches:
    def __init__(self, folder):
        self._benches = {}
        check_layouts(base(), LAYOUTS)
        kinds = ("ties", "positions", "qk_norm")
        for word in ("", *kinds):
            words = [w for w in kinds if w != word]
            group = [x for x in LAYOUTS if word in x.name and not any(w in x.name for w in words)]
            place = folder / f"bench-{word}"
            place.mkdir()
            bench = Bench(base(), group, steps=3, dtype="fp64", folder=place)
            self._benches |= {layout.name: bench for layout in group}

    def of(self, layout_name):
        return self._benches[layout_name]

    def verify(self, layout, before=None):
        return self.of(layout.name).verify(layout, before=before)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_clean_tree_raises_no_alarm(layout, benches):
    result = benches.verify(layout)
    assert result.is_equal, result


def test_bugs_are_many():
    assert len(MUTATIONS) >= 20


@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_the_planted_bug_is_noticed(name, benches):
    result = benches.verify(BY_NAME[SHOWS_IN[name]], before=MUTATIONS[name])
    assert not result.is_equal
    assert "TypeError" not in result.cause and "AttributeError" not in result.cause  # the plant's own mistake


@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_no_planted_bug_shows_in_one_process(name, benches):
    """Else it would be none of composition, and a plain unit test would do."""
    bench = benches.of(SHOWS_IN[name])
    (alone,) = parse_layouts(f"mbs={bench.global_batch_size}")
    assert bench.verify(alone, before=MUTATIONS[name]).is_equal
