"""The sample stream: sample i as a pure function of (seed, sources, i), so a run resumes from a number.

Within a source and epoch the documents are permuted, joined, and cut into windows of seq_len + 1
tokens with stride seq_len (the last token of a window is the first of the next one, as label there
and input here); the windows are permuted again. What is left at the end of an epoch, shorter than a
window, is dropped; the next epoch permutes anew, for ever.

Permutations are the stable order of raw PCG64 words, whose stream numpy guarantees, unlike that of
`Generator.permutation`. An epoch costs a sort and 24 bytes of memory a document and window.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megallama.host.errors import UserError

MAX_PERIOD = 1 << 16
"""Blends repeat after at most this many samples; weights are rounded to shares of it where they must be."""


class TokenSource(Protocol):
    """What a stream reads: `TokenFile`, or documents in memory."""

    name: str
    document_lengths: npt.NDArray[np.int64]

    def read(self, document: int, *, start: int, count: int) -> npt.NDArray[np.int64]:
        """Tokens [start, start + count) of a document."""


@dataclass(frozen=True)
class WeightedTokenFile:
    """A source and its share of the samples, relative to the other sources."""

    file: TokenSource
    weight: float = 1.0


@dataclass(frozen=True)
class Piece:
    """Part of one document in a sample."""

    file: TokenSource
    document: int
    start: int
    """First token within the document."""
    count: int


class Blend:
    """Which source each sample comes from: a period of Tijdeman's chairman rule, repeated.

    After any number of samples each source has had its share to within one sample. The plain
    largest-deficit rule does not keep that bound with many sources; the rule here takes, among the
    sources with a deficit of at least 1 / (2n - 2), the one whose next sample is due first
    (R. Tijdeman, "The chairman assignment problem", 1980). `draw` costs O(1) anywhere; building
    costs period x sources, the period being the common denominator of the weights.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.shares = _shares(weights)
        self.period = sum(self.shares)
        source_of, number_of = _schedule(self.shares)
        self._source_of = np.array(source_of, dtype=np.int32)
        self._number_of = np.array(number_of, dtype=np.int32)

    def draw(self, index: int) -> tuple[int, int]:
        """(source, how many samples of that source came before) of sample `index`."""
        rounds, place = divmod(index, self.period)
        source = int(self._source_of[place])
        return source, rounds * self.shares[source] + int(self._number_of[place])


class SampleStream:
    """Samples of seq_len + 1 tokens from a blend of sources; see the top of the file.

    Raises:
        UserError: no source, a source shorter than one window, or a weight that is not positive.
    """

    def __init__(
        self, sources: Sequence[WeightedTokenFile], *, seq_len: int, seed: int, shuffle: bool = True
    ) -> None:
        if not sources:
            raise UserError("no data source (0 given): set data.sources")
        for source in sources:
            tokens = int(source.file.document_lengths.sum())
            if tokens < seq_len + 1:
                raise UserError(
                    f"data source {source.file.name} is too short ({tokens} tokens) for one sample of"
                    f" seq_len + 1 ({seq_len + 1}) tokens: prepare more text or lower train.seq_len"
                )
            if not (math.isfinite(source.weight) and source.weight > 0):
                raise UserError(
                    f"weight of data source {source.file.name} ({source.weight}) must be above 0:"
                    " change it or leave the source out"
                )
        self.seq_len = seq_len
        self._blend = Blend([source.weight for source in sources])
        self._sources = [
            _Windows(source.file, number=number, seq_len=seq_len, seed=seed, shuffle=shuffle)
            for number, source in enumerate(sources)
        ]

    @property
    def epoch_samples(self) -> list[int]:
        """Samples of one epoch of each source."""
        return [source.num_windows for source in self._sources]

    def sample(self, index: int) -> npt.NDArray[np.int64]:
        """Tokens of sample `index` >= 0, shape [seq_len + 1]."""
        pieces = self.locate(index)
        return np.concatenate([p.file.read(p.document, start=p.start, count=p.count) for p in pieces])

    def document_starts(self, index: int) -> tuple[int, ...]:
        """Where documents begin among the seq_len inputs of sample `index`; 0 first, whatever lies there."""
        ends = itertools.accumulate(piece.count for piece in self.locate(index))
        return (0, *(end for end in ends if end < self.seq_len))

    def locate(self, index: int) -> list[Piece]:
        """Where the tokens of sample `index` come from, in order."""
        assert index >= 0, index
        source, number = self._blend.draw(index)
        return self._sources[source].locate(number)


@dataclass(frozen=True)
class _Epoch:
    """Order of one epoch of a source."""

    documents: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    """Position of each document's first token when they are joined in this order."""
    windows: npt.NDArray[np.int64]


class _Windows:
    """The windows of one source, epoch after epoch."""

    def __init__(self, file: TokenSource, *, number: int, seq_len: int, seed: int, shuffle: bool) -> None:
        self._file = file
        self._number = number
        self._seq_len = seq_len
        self._seed = seed
        self._shuffle = shuffle
        self.num_windows = (int(file.document_lengths.sum()) - 1) // seq_len
        # Two: around the end of an epoch samples of both are asked for in turn.
        self._epoch = lru_cache(maxsize=2)(self._build_epoch)

    def locate(self, number: int) -> list[Piece]:
        """Pieces of the source's window `number`, counted over all epochs."""
        epoch_number, place = divmod(number, self.num_windows)
        # Unshuffled epochs are all the same one.
        epoch = self._epoch(epoch_number if self._shuffle else 0)
        position = int(epoch.windows[place]) * self._seq_len
        missing = self._seq_len + 1
        at = int(np.searchsorted(epoch.starts, position, side="right")) - 1
        pieces = []
        while missing:
            document = int(epoch.documents[at])
            start = position - int(epoch.starts[at])
            count = min(missing, int(self._file.document_lengths[document]) - start)
            if count:  # Megatron's files may hold empty documents
                pieces.append(Piece(file=self._file, document=document, start=start, count=count))
            position += count
            missing -= count
            at += 1
        return pieces

    def _build_epoch(self, epoch: int) -> _Epoch:
        lengths = self._file.document_lengths
        if self._shuffle:
            generator = np.random.PCG64(np.random.SeedSequence([self._seed, self._number, epoch]))
            documents = _permutation(generator, len(lengths))
            windows = _permutation(generator, self.num_windows)
        else:
            documents, windows = np.arange(len(lengths)), np.arange(self.num_windows)
        ends = np.cumsum(lengths[documents])
        return _Epoch(documents=documents, starts=ends - lengths[documents], windows=windows)


def _permutation(generator: np.random.PCG64, count: int) -> npt.NDArray[np.int64]:
    words = np.asarray(generator.random_raw(count), dtype=np.uint64)
    return np.argsort(words, kind="stable").astype(np.int64)


def _shares(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of `weights` with the smallest sum, which is at most MAX_PERIOD."""
    if len(weights) > MAX_PERIOD // 16:
        raise UserError(f"too many data sources ({len(weights)}): join some, {MAX_PERIOD // 16} are possible")
    exact = [Fraction(weight).limit_denominator(MAX_PERIOD) for weight in weights]
    scale = math.lcm(*(share.denominator for share in exact))
    whole = [int(share * scale) for share in exact]
    if sum(whole) > MAX_PERIOD or 0 in whole:
        total = math.fsum(weights)
        whole = [max(1, round(weight / total * (MAX_PERIOD - len(weights)))) for weight in weights]
    divisor = math.gcd(*whole)
    return [share // divisor for share in whole]


def _schedule(shares: Sequence[int]) -> tuple[list[int], list[int]]:
    """Source of each sample of one period, and how many of that source came before it."""
    period, slack = sum(shares), max(1, 2 * len(shares) - 2)
    counts = [0] * len(shares)
    source_of, number_of = [], []
    for taken in range(1, period + 1):
        best, best_due = -1, math.inf
        for source, share in enumerate(shares):
            # All in units of 1 / (period x slack), whole numbers: no rounding decides the order.
            deficit = (share * taken - period * counts[source]) * slack
            if deficit >= period:
                due = (period * slack - period - deficit) / share
                if due < best_due:
                    best, best_due = source, due
        assert best >= 0, (shares, taken)
        source_of.append(best)
        number_of.append(counts[best])
        counts[best] += 1
    assert counts == list(shares), (counts, shares)
    return source_of, number_of
