"""The sample stream: exact epochs, packing, the same for everybody and for ever."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.host.errors import UserError
from megallama.stream.stream import token_of
from tests.support.memory import Memory, stream_of

lengths_and_seq_len = st.tuples(
    st.lists(st.integers(0, 17), min_size=1, max_size=12), st.integers(1, 9)
).filter(lambda drawn: sum(drawn[0]) > drawn[1])


@settings(max_examples=150, deadline=None)
@given(drawn=lengths_and_seq_len, seed=st.integers(0, 2**40), epoch=st.integers(0, 3), shuffle=st.booleans())
def test_an_epoch_has_every_token_once_but_for_its_tail(
    drawn: tuple[list[int], int], seed: int, epoch: int, shuffle: bool
) -> None:
    lengths, seq_len = drawn
    stream = stream_of(Memory(lengths), seq_len=seq_len, seed=seed, shuffle=shuffle)
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


def test_each_epoch_has_its_own_order_and_its_own_cuts() -> None:
    stream = stream_of(Memory([10] * 40), seq_len=9, seed=3)
    windows = stream.epoch_samples[0]
    first, second = ([tuple(stream.sample(e * windows + i)) for i in range(windows)] for e in range(2))
    assert first != second and set(first) != set(second)
    assert [s[0] for s in first] != sorted(s[0] for s in first)
    dropped = [set(range(400)) - {t for s in samples for t in s} for samples in (first, second)]
    assert dropped[0] != dropped[1], "no token is left out of every epoch"


def test_unshuffled_is_the_file_in_order_again_and_again() -> None:
    stream = stream_of(Memory([3, 0, 5, 2]), seq_len=4, shuffle=False)
    expected = [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    assert [stream.sample(i).tolist() for i in range(4)] == expected * 2


@settings(max_examples=100, deadline=None)
@given(drawn=lengths_and_seq_len, epoch=st.integers(0, 2))
def test_cut_windows_begin_with_documents_and_never_hold_the_rest_of_one(
    drawn: tuple[list[int], int], epoch: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    lengths, seq_len = drawn
    begins = np.cumsum([0, *lengths[:-1]])[np.array(lengths) > 0].tolist()
    expected, due = [], 0
    for start in begins:  # the definition, one document after another
        if start >= due and start + seq_len + 1 <= sum(lengths):
            expected.append(list(range(start, start + seq_len + 1)))
            due = start + seq_len
    memory, folder = Memory(lengths), tmp_path_factory.mktemp("index")
    windows = len(expected)
    assert windows, "the first one begins at 0 and fits"
    in_order = stream_of(memory, seq_len=seq_len, cut=True, folder=folder, shuffle=False)
    assert [in_order.sample(i).tolist() for i in range(windows)] == expected
    shuffled = stream_of(memory, seq_len=seq_len, cut=True, folder=folder)
    samples = [shuffled.sample(epoch * windows + i).tolist() for i in range(windows)]
    assert sorted(samples) == expected


@settings(max_examples=100, deadline=None)
@given(drawn=lengths_and_seq_len, seed=st.integers(0, 2**40), index=st.integers(0, 40))
def test_document_starts_are_where_the_tokens_jump(
    drawn: tuple[list[int], int], seed: int, index: int
) -> None:
    lengths, seq_len = drawn
    stream = stream_of(Memory(lengths), seq_len=seq_len, seed=seed)
    sample = stream.sample(index)
    ends = np.cumsum(lengths)
    document = np.searchsorted(ends, sample, side="right")
    jumps = (np.diff(document) != 0) | (np.diff(sample) != 1)  # the second: the ring of one document closes
    located = stream.locate(index)
    assert stream.document_starts(located) == [0, *(np.flatnonzero(jumps) + 1).tolist()]
    for place, token in enumerate(sample):
        assert token_of(located, place) == token


@settings(max_examples=60, deadline=None)
@given(drawn=lengths_and_seq_len, index=st.integers(0, 40), data=st.data())
def test_parts_of_a_sample_are_read_alone(
    drawn: tuple[list[int], int], index: int, data: st.DataObject
) -> None:
    lengths, seq_len = drawn
    stream = stream_of(Memory(lengths), seq_len=seq_len)
    start = data.draw(st.integers(0, seq_len))
    stop = data.draw(st.integers(start, seq_len + 1))
    part = [t for view in stream.read(stream.locate(index), start, stop) for t in view.tolist()]
    assert part == stream.sample(index).tolist()[start:stop]


def test_the_stream_is_fixed_for_ever() -> None:
    sources = Memory([7, 8, 9, 10]), Memory([20, 20], name="b")
    stream = stream_of(*sources, seq_len=5, seed=1234, weights=[2, 1])
    found = [stream.sample(i).tolist()[0] for i in (0, 1, 2, 3, 50, 10**12)]
    assert found == [4, 3, 24, 14, 22, 39], "a resumed run would see other data than before"


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(30)), seed=st.integers(0, 9))
def test_samples_do_not_depend_on_what_was_asked_before(order: list[int], seed: int) -> None:
    files = (Memory([5, 6, 7]), Memory([9, 2]))
    straight = stream_of(*files, seed=seed)
    expected = [straight.sample(i).tolist() for i in range(30)]
    jumping = stream_of(*files, seed=seed)
    assert {i: jumping.sample(i).tolist() for i in order} == dict(enumerate(expected))


def test_seed_and_source_change_the_order() -> None:
    def orders(seed: int) -> list[list[int]]:
        stream = stream_of(Memory([3] * 50), Memory([3] * 50, name="b"), seed=seed)
        drawn = [stream.sample(i).tolist()[0] for i in range(40)]
        return [drawn[0::2], drawn[1::2]]

    assert orders(1) == orders(1)
    (a, b), (c, d) = orders(1), orders(2)
    assert len({tuple(order) for order in (a, b, c, d)}) == 4


def test_the_order_in_which_sources_are_named_means_nothing() -> None:
    a, b = Memory([30]), Memory([40], name="b", first=100)
    one, other = stream_of(a, b, weights=[3, 1]), stream_of(b, a, weights=[1, 3])
    assert [one.sample(i).tolist() for i in range(50)] == [other.sample(i).tolist() for i in range(50)]


def test_proportions_of_samples_follow_the_weights() -> None:
    stream = stream_of(Memory([1000]), Memory([2000], name="b"), Memory([9], name="c"), weights=[3, 1, 0])
    drawn = Counter(stream.locate(i).source.name for i in range(400))
    assert drawn == {"内存": 300, "b": 100}


@pytest.mark.parametrize(
    ("files", "weights", "message"),
    [
        ([], [], "no data source"),
        ([Memory([2, 2])], [1.0], r"内存 is too short \(4 tokens\).*seq_len \+ 1 \(5\)"),
        ([Memory([9])], [0.0], r"no data source with a weight above 0 \(1 given\)"),
        ([Memory([9])], [-1.0], r"weight of data source 内存 \(-1.0\) must be a finite number of at least 0"),
        ([Memory([9])], [math.nan], r"weight of data source 内存 \(nan\)"),
        ([Memory([9])], [math.inf], r"weight of data source 内存 \(inf\)"),
        ([Memory([9]), Memory([9])], [1.0, 2.0], "内存 and 内存 hold the same data"),
        ([Memory([9]), Memory([9], name="b")], [1.0, 1e-6], r"b \(1e-06\) is less than one sample in 65536"),
    ],
)
def test_impossible_sources(files: list[Memory], weights: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        stream_of(*files, weights=weights)


def test_one_window_is_enough(tmp_path: Path) -> None:
    stream = stream_of(Memory([2, 3]))
    assert stream.epoch_samples == [1]
    assert sorted(stream.sample(99).tolist()) == [0, 1, 2, 3, 4]
