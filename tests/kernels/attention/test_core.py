"""Attention inside documents on one process and over context-parallel ranks, against the mask written out."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.kernels.attention import plan as planning
from megallama.kernels.attention.core import BACKENDS, Attention, choose_attention, masked_attention
from megallama.kernels.attention.plan import Block, Plan, plan_shard_keys, plan_whole_keys
from megallama.kernels.attention.zigzag import stretches, take_shard, to_natural, to_shards
from tests.kernels.attention.attention_on_ranks import (
    KINDS,
    draw,
    errors_of,
    multiply_adds_of,
    results,
    worst_error,
)
from tests.support.ranks import run_ranks

SEQ_LEN = 96


def documents_of(*seeds: int, seq_len: int = SEQ_LEN, most: int = 12) -> tuple[tuple[int, ...], ...]:
    """Random document starts, one row a seed."""
    rows = []
    for seed in seeds:
        random_number = random.Random(seed)
        rows.append(
            (
                0,
                *sorted(
                    random_number.sample(range(1, seq_len), random_number.randint(0, min(most, seq_len - 1)))
                ),
            )
        )
    return tuple(rows)


DOCUMENTS = [
    None,
    documents_of(1, 2),
    documents_of(3, 3),
    ((0, 1, 2, 3, 95), (0,)),
    (tuple(range(SEQ_LEN)), (0, 48)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_one_process_equals_the_mask(backend, kv_heads, documents):
    tensors = draw(4, kv_heads, seq_len=SEQ_LEN, batch=2)
    wanted = results(masked_attention, tensors, documents=documents)
    assert worst_error(results(Attention(backend), tensors, documents=documents), wanted) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_close(dtype):
    tensors = draw(4, 2, seq_len=SEQ_LEN, batch=2)
    wanted = results(masked_attention, tensors, documents=DOCUMENTS[1])
    got = results(Attention("sdpa"), [t.to(dtype) for t in tensors], documents=DOCUMENTS[1])
    assert all(t.dtype == dtype for t in got)
    assert (
        worst_error([t.double() for t in got], wanted) < {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}[dtype]
    )


def test_documents_beyond_the_packed_length_and_beside_short_ones():
    limit = planning.MAX_PACKED_LENGTH
    documents = ((0, 5, 9, limit + 10, limit + 11, 2 * limit),)
    tensors = draw(2, 1, seq_len=2 * limit + 40, batch=1)
    plan = plan_whole_keys(Block(documents, 1, 2 * limit + 40, 1, 0, False, torch.device("cpu")))
    assert len(plan.rectangles) >= 1 and len(plan.packs) >= 1, "both ways are taken"
    wanted = results(masked_attention, tensors, documents=documents)
    assert worst_error(results(Attention("sdpa"), tensors, documents=documents), wanted) <= 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_document_does_not_see_the_others(backend):
    documents = ((0, 20, 50),)
    tensors = draw(4, 2, seq_len=SEQ_LEN, batch=1)
    attention = Attention(backend)
    before = attention(*tensors[:3], scale=0.3, documents=documents)
    changed = [t.clone() for t in tensors[:3]]
    for tensor in changed:
        tensor[:20] += 1.0
    after = attention(*changed, scale=0.3, documents=documents)
    assert torch.equal(before[20:], after[20:])
    assert not torch.allclose(before[:20], after[:20])
    unmasked = attention(*changed, scale=0.3) - attention(*tensors[:3], scale=0.3)
    assert unmasked[20:].abs().max() > 1e-3, "without the mask this test would fail"


def test_choice():
    assert choose_attention("auto") == Attention("sdpa", "all_gather")
    assert choose_attention("reference", cp_kind="ring") == Attention("reference", "ring")


# The cut of a sequence and the plans, as plain sets of pairs.


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
def test_shards_hold_each_position_once_and_come_back(cp_size):
    x = torch.arange(24 * 5).view(24, 5)
    shards = [take_shard(x, dim=0, cp_size=cp_size, cp_rank=rank) for rank in range(cp_size)]
    assert sorted(torch.cat(shards)[:, 0].tolist()) == x[:, 0].tolist()
    assert torch.equal(torch.stack(shards), to_shards(x, cp_size=cp_size))
    assert torch.equal(to_natural(torch.stack(shards)), x)


def pairs_of(plan: Plan, batch: int) -> list[tuple[int, int, int]]:
    """(row, query, key) of every score that a plan computes, padding left out."""
    pairs = []
    for at in plan.rectangles:
        for row in range(*at.rows.indices(batch)):
            for i, q in enumerate(range(at.q.start, at.q.stop)):
                last = at.k.start + i + 1 if at.is_causal else at.k.stop
                pairs += [(row, q, k) for k in range(at.k.start, last)]
    for pack in plan.packs:
        offsets = pack.offsets.tolist()
        slots = pack.slots.tolist()
        for number, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
            assert end - begin <= pack.length
            assert slots[begin:end] == [number * pack.length + i for i in range(end - begin)]
            for i, j in itertools.combinations_with_replacement(range(begin, end), 2):
                q, k = int(pack.q_index[j]), int(pack.k_index[i])
                assert q % batch == k % batch
                pairs.append((q % batch, q // batch, k // batch))
    return pairs


@settings(max_examples=60, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 10**6), min_size=1, max_size=3),
    cp_size=st.sampled_from([1, 2, 3, 4]),
    is_packing_all=st.booleans(),
)
def test_plans_compute_each_seen_pair_once_and_no_other(seeds, cp_size, is_packing_all):
    seq_len = 24
    documents = documents_of(*seeds, seq_len=seq_len)
    wanted = sorted(
        (row, q, k)
        for row, starts in enumerate(documents)
        for q in range(seq_len)
        for k in range(max(s for s in starts if s <= q), q + 1)
    )

    def positions(rank):
        return [
            p for begin, end in stretches(seq_len, cp_size=cp_size, cp_rank=rank) for p in range(begin, end)
        ]

    whole, ring = [], []
    for rank in range(cp_size):
        block = Block(documents, len(seeds), seq_len, cp_size, rank, is_packing_all, torch.device("cpu"))
        mine = positions(rank)
        whole += [(row, mine[q], k) for row, q, k in pairs_of(plan_whole_keys(block), len(seeds))]
        for source in range(cp_size):
            theirs = positions(source)
            found = pairs_of(plan_shard_keys(block, source), len(seeds))
            ring += [(row, mine[q], theirs[k]) for row, q, k in found]
    assert sorted(whole) == wanted
    assert sorted(ring) == wanted


def test_equal_rows_and_touching_rectangles_share_calls():
    block = Block(None, 3, 64, 4, 1, False, torch.device("cpu"))
    assert [len(plan_shard_keys(block, source).rectangles) for source in (0, 2, 3)] == [1, 1, 1]


# Context parallelism.


@pytest.mark.parametrize("cp_size", [2, 4])
def test_three_ways_equal_the_mask(cp_size):
    cases = [
        ("sdpa", kind, 4, kv_heads, documents, False)
        for kind in KINDS
        for kv_heads in (1, 2, 4)
        for documents in DOCUMENTS
    ]
    cases += [("reference", kind, 8, 2, DOCUMENTS[1], False) for kind in KINDS]
    cases += [("sdpa", kind, 12, 6, DOCUMENTS[1], True) for kind in KINDS]
    for rank, errors in enumerate(run_ranks(cp_size, errors_of, cases, SEQ_LEN)):
        for case, error in zip(cases, errors, strict=True):
            assert error <= 1e-12, (rank, case, error)


@pytest.mark.parametrize("cp_size", [2, 4])
def test_ranks_have_equal_work(cp_size):
    seq_len = 512
    counted = run_ranks(cp_size, multiply_adds_of, KINDS, seq_len)
    whole = 7 * 8 * 8 * seq_len * (seq_len + 1) // 2
    for kind in KINDS:
        work = [rank[kind] for rank in counted]
        assert max(work) <= 1.05 * sum(work) / cp_size, (kind, work)
        assert sum(work) == whole, "no score is computed twice or left out"


def calls_and_scores(documents, seq_len):
    """Kernel calls of a pass on a CPU, and the scores that they compute, padding counted."""
    plan = plan_whole_keys(Block(documents, 1, seq_len, 1, 0, False, torch.device("cpu")))
    squares = [(1, at.q.stop - at.q.start) for at in plan.rectangles]
    assert all(at.is_causal for at in plan.rectangles)
    squares += [(pack.count, pack.length) for pack in plan.packs]
    return len(squares), sum(count * length * (length + 1) // 2 for count, length in squares)


@pytest.mark.parametrize("length", [1, 4, 17, 32, 129, 200, 256, 257, 1000, None])
def test_many_short_documents_cost_no_more_than_one_long(length):
    """In work, not in time: benchmarks/attention_documents.py measures that."""
    seq_len = 4096
    if length is None:
        documents = documents_of(0, seq_len=seq_len, most=seq_len)
    else:
        documents = (tuple(range(0, seq_len, length)),)
    calls, scores = calls_and_scores(documents, seq_len)
    packs, long = 5, seq_len // planning.MAX_PACKED_LENGTH
    assert calls <= packs + long
    assert scores <= seq_len * (seq_len + 1) // 2
