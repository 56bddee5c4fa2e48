"""Permutations without a table: every number once, like chance, the same for ever."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.stream.permutation import Permutation

FIXED = [638456404, 11952374, 110964251]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 700), key=st.text(max_size=5))
def test_every_number_comes_once(count: int, key: str) -> None:
    order = Permutation(count, key=key)
    assert len(order) == count
    assert sorted(order[place] for place in range(count)) == list(range(count))


def test_any_size_without_a_table() -> None:
    order = Permutation(10**15, key="大")
    drawn = [order[place] for place in range(500)]
    assert len(set(drawn)) == 500 and max(drawn) > 9 * 10**14 and min(drawn) < 10**14


def test_orders_are_as_likely_as_each_other() -> None:
    seen = Counter(tuple(order) for order in (Permutation(4, key=f"{key}") for key in range(4800)))
    assert set(seen) == set(itertools.permutations(range(4)))
    # 23 degrees of freedom: chance exceeds 60 once in 30,000 draws of keys, and the keys are fixed.
    assert sum((count - 200) ** 2 / 200 for count in seen.values()) < 60


def test_neighbours_do_not_stay_neighbours() -> None:
    order = Permutation(1000, key="a")
    steps = Counter(abs(order[place + 1] - order[place]) for place in range(999))
    assert steps.most_common(1)[0][1] < 12
    other = Permutation(1000, key="b")
    assert sum(order[place] == other[place] for place in range(1000)) < 10


def test_the_order_is_fixed_for_ever() -> None:
    found = [Permutation(10**9, key="1234 a 0")[place] for place in range(3)]
    assert found == FIXED, "a resumed run would see other data than before"


@pytest.mark.parametrize("place", [-1, 3])
def test_places_outside(place: int) -> None:
    with pytest.raises(IndexError, match=rf"place {place} of a permutation of 3"):
        Permutation(3, key="")[place]
