"""The sample stream: exact epochs, exact proportions, the same for everybody and for ever."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.data.stream import MAX_PERIOD, Blend, SampleStream, WeightedTokenFile
from megallama.host.errors import UserError


@dataclass
class Memory:
    """Documents of consecutive numbers, so that every token tells where it stands."""

    document_lengths: npt.NDArray[np.int64]
    name: str = "内存"

    def read(self, document: int, *, start: int, count: int) -> npt.NDArray[np.int64]:
        first = int(self.document_lengths[:document].sum()) + start
        assert start + count <= self.document_lengths[document]
        return np.arange(first, first + count, dtype=np.int64)


def memory(*lengths: int) -> Memory:
    return Memory(np.array(lengths, dtype=np.int64))


def stream_of(
    *files: Memory, seq_len: int = 4, seed: int = 1, weights: list[float] | None = None, shuffle: bool = True
) -> SampleStream:
    shares = weights or [1.0] * len(files)
    sources = [WeightedTokenFile(file, weight) for file, weight in zip(files, shares, strict=True)]
    return SampleStream(sources, seq_len=seq_len, seed=seed, shuffle=shuffle)


lengths_and_seq_len = st.tuples(
    st.lists(st.integers(0, 17), min_size=1, max_size=12), st.integers(1, 9)
).filter(lambda drawn: sum(drawn[0]) > drawn[1])


@settings(max_examples=150, deadline=None)
@given(drawn=lengths_and_seq_len, seed=st.integers(0, 2**40), epoch=st.integers(0, 3), shuffle=st.booleans())
def test_an_epoch_has_every_token_once_but_for_its_tail(
    drawn: tuple[list[int], int], seed: int, epoch: int, shuffle: bool
) -> None:
    lengths, seq_len = drawn
    stream = stream_of(memory(*lengths), seq_len=seq_len, seed=seed, shuffle=shuffle)
    windows = (sum(lengths) - 1) // seq_len
    assert stream.epoch_samples == [windows]
    samples = [stream.sample(epoch * windows + i) for i in range(windows)]
    assert all(sample.shape == (seq_len + 1,) and sample.dtype == np.int64 for sample in samples)
    inputs = np.concatenate([sample[:-1] for sample in samples])
    labels = np.concatenate([sample[1:] for sample in samples])
    assert len(set(inputs)) == len(inputs) == len(set(labels)) == windows * seq_len
    # Windows join up again: each last token but one is the first token of exactly one other window.
    firsts = {int(sample[0]) for sample in samples}
    assert sum(int(sample[-1]) in firsts for sample in samples) >= windows - 1
    dropped = set(range(sum(lengths))) - set(inputs) - set(labels)
    assert len(dropped) == sum(lengths) - windows * seq_len - 1 < seq_len


def test_documents_and_windows_are_both_permuted_anew_in_each_epoch() -> None:
    stream = stream_of(memory(*[10] * 40), seq_len=9, seed=3)
    windows = stream.epoch_samples[0]
    first, second = ([tuple(stream.sample(e * windows + i)) for i in range(windows)] for e in range(2))
    assert first != second
    # Other documents are neighbours in the second epoch: permuting windows alone would not do that.
    assert set(first) != set(second)
    assert [s[0] for s in first] != sorted(s[0] for s in first)


def test_unshuffled_is_the_file_in_order_again_and_again() -> None:
    stream = stream_of(memory(3, 0, 5, 2), seq_len=4, shuffle=False)
    expected = [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    assert [stream.sample(i).tolist() for i in range(4)] == expected * 2


def test_located_pieces_are_what_the_sample_holds() -> None:
    stream = stream_of(memory(3, 0, 0, 5, 0, 1, 8, 0), seq_len=6, seed=5)
    for index in range(12):
        pieces = stream.locate(index)
        assert all(piece.count > 0 for piece in pieces)
        parts = [piece.file.read(piece.document, start=piece.start, count=piece.count) for piece in pieces]
        assert np.concatenate(parts).tolist() == stream.sample(index).tolist()


def test_the_stream_is_fixed_for_ever() -> None:
    stream = stream_of(memory(7, 8, 9, 10), memory(20, 20), seq_len=5, seed=1234, weights=[2, 1])
    found = [stream.sample(i).tolist()[0] for i in (0, 1, 2, 3, 50, 10**12)]
    assert found == [29, 0, 7, 22, 11, 10], "a resumed run would see other data than before"


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(30)), seed=st.integers(0, 9))
def test_samples_do_not_depend_on_what_was_asked_before(order: list[int], seed: int) -> None:
    files = (memory(5, 6, 7), memory(9, 2))
    straight = stream_of(*files, seed=seed)
    expected = [straight.sample(i).tolist() for i in range(30)]
    jumping = stream_of(*files, seed=seed)
    assert {i: jumping.sample(i).tolist() for i in order} == dict(enumerate(expected))


def test_seed_and_source_number_change_the_order() -> None:
    file = memory(*[3] * 50)

    def orders(seed: int) -> list[list[int]]:
        stream = stream_of(file, file, seed=seed)
        drawn = [stream.sample(i).tolist()[0] for i in range(40)]
        return [drawn[0::2], drawn[1::2]]

    assert orders(1) == orders(1)
    (a, b), (c, d) = orders(1), orders(2)
    assert len({tuple(order) for order in (a, b, c, d)}) == 4


@settings(max_examples=150, deadline=None)
@given(weights=st.lists(st.integers(1, 60), min_size=1, max_size=9))
def test_shares_are_exact_to_within_one_sample_everywhere(weights: list[int]) -> None:
    blend = Blend([float(weight) for weight in weights])
    total = sum(weights)
    counts = [0] * len(weights)
    for index in range(min(3 * total, 1500)):
        source, number = blend.draw(index)
        assert number == counts[source]
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
        for count, share in zip(counts, blend.shares, strict=True):
            assert abs(count * blend.period - share * (index + 1)) < blend.period
    assert counts == blend.shares


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([0.7, 0.3], [7, 3]),
        ([1, 1, 1], [1, 1, 1]),
        ([1 / 3, 2 / 3], [1, 2]),
        ([30, 60], [1, 2]),
        ([0.05], [1]),
    ],
)
def test_plain_weights_are_kept_exactly(weights: list[float], shares: list[int]) -> None:
    assert Blend(weights).shares == shares


@settings(max_examples=12, deadline=None)
@given(weights=st.lists(st.floats(1e-3, 1e9), min_size=2, max_size=6))
def test_any_weights_are_kept_to_one_in_many_thousands(weights: list[float]) -> None:
    blend = Blend(weights)
    assert blend.period <= MAX_PERIOD and min(blend.shares) >= 1
    for weight, share in zip(weights, blend.shares, strict=True):
        assert math.isclose(
            weight / sum(weights), share / blend.period, abs_tol=len(weights) * 2 / MAX_PERIOD
        )


def test_far_samples_are_as_cheap_as_near_ones() -> None:
    stream = stream_of(memory(*[50] * 2000), memory(*[50] * 2000), weights=[0.123456789, 0.3])
    stream.sample(0)
    begin = time.perf_counter()
    stream.sample(10**15)
    assert time.perf_counter() - begin < 0.5


def test_proportions_of_samples_follow_the_weights() -> None:
    stream = stream_of(memory(1000), Memory(np.array([2000]), name="b"), weights=[3, 1])
    drawn = Counter(stream.locate(i)[0].file.name for i in range(400))
    assert drawn == {"内存": 300, "b": 100}


@pytest.mark.parametrize(
    ("files", "weights", "message"),
    [
        ([], [], "no data source"),
        ([memory(2, 2)], [1.0], r"内存 is too short \(4 tokens\).*seq_len \+ 1 \(5\)"),
        ([memory(9)], [0.0], r"weight of data source 内存 \(0.0\)"),
        ([memory(9)], [-1.0], "weight"),
        ([memory(9)], [math.nan], "weight"),
    ],
)
def test_impossible_sources(files: list[Memory], weights: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        stream_of(*files, weights=weights)


def test_one_window_is_enough() -> None:
    stream = stream_of(memory(2, 3))
    assert stream.epoch_samples == [1]
    assert sorted(stream.sample(99).tolist()) == [0, 1, 2, 3, 4]


@settings(max_examples=100, deadline=None)
@given(drawn=lengths_and_seq_len, seed=st.integers(0, 2**40), index=st.integers(0, 40))
def test_document_starts_are_where_the_tokens_jump(
    drawn: tuple[list[int], int], seed: int, index: int
) -> None:
    lengths, seq_len = drawn
    file = memory(*lengths)
    first = np.cumsum([0, *lengths[:-1]])
    stream = stream_of(file, seq_len=seq_len, seed=seed)
    document = np.searchsorted(first + np.array(lengths), stream.sample(index)[:-1], side="right")
    assert list(stream.document_starts(index)) == [0, *(np.flatnonzero(np.diff(document)) + 1).tolist()]
