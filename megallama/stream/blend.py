"""Which source each sample comes from: exact proportions, and direct access to any sample.

Within a block of `period` samples sources take turns by Tijdeman's chairman rule, which keeps each
of them within one sample of its share after every sample (the plain largest-deficit rule does not,
with many sources). It takes, among the sources with a deficit of at least 1 / (2n - 2), the one
whose next sample is due first (R. Tijdeman, "The chairman assignment problem", 1980).

Weights whose common denominator is at most MAX_PERIOD give that block again and again. Others have
blocks of MAX_PERIOD samples whose whole shares follow the exact weights, so that nothing drifts: a
source is then within one sample at the block's ends and within two inside of it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt

MAX_PERIOD = 1 << 16
"""Largest block. A source with a smaller share than one sample in a block cannot be blended."""


class Blend:
    """Sources in the proportions of `weights`, all above 0 and at least 1 / MAX_PERIOD of their sum."""

    def __init__(self, weights: Sequence[float]) -> None:
        whole = whole_weights(weights)
        total = sum(whole)
        assert whole and is_blendable(weights), weights
        self.period = total if total <= MAX_PERIOD else MAX_PERIOD
        self._total = total
        self._upto = [sum(whole[:end]) for end in range(len(whole) + 1)]
        self._is_repeating = total <= MAX_PERIOD
        self._latest: tuple[int, _Turns] | None = None

    def __len__(self) -> int:
        return len(self._upto) - 1

    def draw(self, index: int) -> tuple[int, int]:
        """(source, how many samples of that source came before) of sample `index`."""
        block, place = divmod(index, self.period)
        turns = self._turns(block)
        source = int(turns.source_of[place])
        return source, self._before_block(block, source) + int(turns.number_of[place])

    def counts(self, index: int) -> list[int]:
        """How many of the first `index` samples come from each source."""
        block, place = divmod(index, self.period)
        counts = [self._before_block(block, source) for source in range(len(self))]
        if place:
            places = self._turns(block).places
            counts = [
                count + int(np.searchsorted(own, place)) for count, own in zip(counts, places, strict=True)
            ]
        return counts

    def index_of(self, source: int, number: int) -> int:
        """Index of sample `number` (from 0) of a source; inverse of `draw`."""
        low, high = 0, 1
        while self._before_block(high, source) <= number:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._before_block(middle, source) <= number else (low, middle)
        within = number - self._before_block(low, source)
        return low * self.period + int(self._turns(low).places[source][within])

    def _before_block(self, block: int, source: int) -> int:
        """Samples of a source before a block. Rounding sums, not shares, keeps the sum over sources exact."""
        samples, upto = block * self.period, self._upto
        return samples * upto[source + 1] // self._total - samples * upto[source] // self._total

    def _turns(self, block: int) -> _Turns:
        first = 0 if self._is_repeating else block
        # Samples in a row are of one block.
        latest = self._latest
        if latest is None or latest[0] != first:
            shares = (
                self._before_block(first + 1, s) - self._before_block(first, s) for s in range(len(self))
            )
            latest = self._latest = first, _take_turns(tuple(shares))
        return latest[1]


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of `weights`, as the user meant them: 0.1 is a tenth, 1 / 3 a third."""
    exact = [_meant(weight) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*whole) or 1
    return [weight // divisor for weight in whole]


def is_blendable(weights: Sequence[float]) -> bool:
    """Whether each weight has at least one sample in MAX_PERIOD."""
    whole = whole_weights(weights)
    return min(whole) * MAX_PERIOD >= sum(whole)


def _meant(weight: float) -> Fraction:
    near = Fraction(weight).limit_denominator(MAX_PERIOD)
    return near if float(near) == weight else Fraction(repr(float(weight)))


@dataclass(frozen=True)
class _Turns:
    """One block."""

    source_of: npt.NDArray[np.int32]
    """Source of each sample."""
    number_of: npt.NDArray[np.int32]
    """How many of that source came before it in the block."""
    places: tuple[npt.NDArray[np.int64], ...]
    """Of each source, where its samples are."""


@lru_cache(maxsize=16)
def _take_turns(shares: tuple[int, ...]) -> _Turns:
    period, slack = sum(shares), max(1, 2 * len(shares) - 2)
    source_of, number_of = np.empty(period, np.int32), np.empty(period, np.int32)
    # (first sample at which it may be taken, source, number); a source's next one enters after its last.
    waiting = [(_eligible(0, share, period, slack), s, 0) for s, share in enumerate(shares) if share]
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []
    for taken in range(1, period + 1):
        while waiting and waiting[0][0] <= taken:
            _, source, number = heapq.heappop(waiting)
            heapq.heappush(ready, (_due(number, shares[source], slack), source, number))
        assert ready, (shares, taken)
        _, source, number = heapq.heappop(ready)
        source_of[taken - 1], number_of[taken - 1] = source, number
        if number + 1 < shares[source]:
            start = _eligible(number + 1, shares[source], period, slack)
            heapq.heappush(waiting, (start, source, number + 1))
    places = tuple(np.flatnonzero(source_of == source) for source in range(len(shares)))
    return _Turns(source_of, number_of, places)


def _eligible(number: int, share: int, period: int, slack: int) -> int:
    """The first sample (from 1) at which the deficit share / period x sample - number is 1 / slack or more."""
    return -(-period * (slack * number + 1) // (share * slack))


def _due(number: int, share: int, slack: int) -> int:
    """Order in which samples are due, whole numbers: no rounding decides between different ones."""
    return ((slack * (number + 1) - 1) << 64) // share
