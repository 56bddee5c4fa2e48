"""Blends: exact shares at every sample, any place reached at once."""

from __future__ import annotations

import math
import random
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.stream.blend import MAX_PERIOD, Blend, is_blendable, whole_weights


def chairman(weights: list[int], samples: int) -> list[int]:
    """Tijdeman's rule as its paper states it, in fractions, one sample after another: the reference."""
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    slack = max(1, 2 * len(weights) - 2)
    counts, order = [0] * len(weights), []
    for taken in range(1, samples + 1):
        late = [s for s, share in enumerate(shares) if share * taken - counts[s] >= Fraction(1, slack)]
        # How long each may still wait before it is 1 - 1 / slack behind.
        source = min(late, key=lambda s: ((1 - Fraction(1, slack) + counts[s]) / shares[s], s))
        counts[source] += 1
        order.append(source)
    return order


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.integers(1, 60), min_size=1, max_size=9))
def test_samples_follow_the_rule_and_stay_within_one_sample(weights: list[int]) -> None:
    blend = Blend([float(weight) for weight in weights])
    total = sum(weights)
    samples = min(2 * total + 7, 500)
    expected = chairman(weights, samples)
    counts = [0] * len(weights)
    for index in range(samples):
        assert blend.counts(index) == counts
        source, number = blend.draw(index)
        assert (source, number) == (expected[index % (total // math.gcd(*weights))], counts[source])
        assert blend.index_of(source, number) == index
        counts[source] += 1
        for weight, count in zip(weights, counts, strict=True):
            assert abs(count * total - weight * (index + 1)) < total


def test_few_large_and_many_small_sources_stay_within_one_sample() -> None:
    # The plain largest-deficit rule is up to 1.14 samples off here.
    weights = [100.0, 50.0, 30.0, *[1.0] * 30]
    blend = Blend(weights)
    counts = [0] * len(weights)
    for index in range(blend.period):
        counts[blend.draw(index)[0]] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count * 210 - weight * (index + 1)) < 210
    assert counts == weights


@pytest.mark.parametrize(
    ("weights", "whole"),
    [
        ([0.7, 0.3], [7, 3]),
        ([1, 1, 1], [1, 1, 1]),
        ([1 / 3, 2 / 3], [1, 2]),
        ([30, 60], [1, 2]),
        ([0.05], [1]),
        ([1e-9, 3e-9], [1, 3]),
        ([0.123456789, 0.876543211], [123456789, 876543211]),
    ],
)
def test_weights_are_what_the_user_meant(weights: list[float], whole: list[int]) -> None:
    assert whole_weights(weights) == whole


@settings(max_examples=8, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 1), min_size=2, max_size=6),
    index=st.integers(0, 10**15),
)
def test_any_weights_never_drift(weights: list[float], index: int) -> None:
    blend, whole = Blend(weights), whole_weights(weights)
    counts = blend.counts(index)
    assert sum(counts) == index
    for weight, count in zip(whole, counts, strict=True):
        assert abs(Fraction(weight, sum(whole)) * index - count) < 2
    for step in range(20):
        source, number = blend.draw(index + step)
        assert number == counts[source] and blend.index_of(source, number) == index + step
        counts[source] += 1
    assert counts == blend.counts(index + 20)


def test_awkward_weights_join_up_where_blocks_meet() -> None:
    draw = random.Random(3)
    weights = [draw.random() for _ in range(7)]
    blend, counts = Blend(weights), [0] * 7
    assert blend.period == MAX_PERIOD
    for index in range(MAX_PERIOD + 500):
        source, number = blend.draw(index)
        assert number == counts[source]
        counts[source] += 1
    assert counts == blend.counts(MAX_PERIOD + 500)


def test_far_samples_are_as_cheap_as_near_ones() -> None:
    blend = Blend([0.7, 0.2, 0.1])
    blend.draw(0)
    begin = time.perf_counter()
    for index in range(10**15, 10**15 + 100):
        blend.draw(index), blend.counts(index)
    assert time.perf_counter() - begin < 0.5


def test_what_is_too_rare_to_blend() -> None:
    assert is_blendable([1.0, 65535.0]) and not is_blendable([1.0, 65536.0])


def test_blocks_that_differ_can_be_asked_in_any_order() -> None:
    weights = [0.123456789, 0.3]
    one, period = Blend(weights), Blend(weights).period
    differing = set()
    for block in (0, 1, 0, 7, 2, 1):
        fresh = Blend(weights)
        places = range(block * period, (block + 1) * period, 97)
        found = [one.draw(place) for place in places]
        assert found == [fresh.draw(place) for place in places]
        differing.add(tuple(source for source, _ in found))
    assert len(differing) > 1, "blocks that are all alike prove nothing"
