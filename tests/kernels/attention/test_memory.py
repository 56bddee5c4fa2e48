"""Memory of attention grows with the sequence, not with its square; the benchmark that shows it runs."""

from __future__ import annotations

import pytest

from benchmarks.attention_memory import LENGTHS, attention_pass, documents_of, peak_bytes
from megallama.kernels.attention.core import Attention, masked_attention
from tests.kernels.attention.attention_on_ranks import KINDS, peak_bytes_of
from tests.support.ranks import run_ranks


def peaks(attention, lengths, document_length):
    return [
        peak_bytes(
            attention_pass(
                attention, seq_len, heads=2, width=16, documents=documents_of(seq_len, document_length)
            )
        )
        for seq_len in lengths
    ]


@pytest.mark.parametrize("document_length", [None, 7, 100, 1000])
def test_peak_is_linear_from_1k_to_32k(document_length):
    small, *_, large = peaks(Attention("sdpa"), [LENGTHS[0], LENGTHS[-1]], document_length)
    assert (LENGTHS[0], LENGTHS[-1]) == (1024, 32768)
    assert large <= 1.1 * 32 * small, (small, large)


def test_the_measure_sees_a_square():
    small, large = peaks(masked_attention, [256, 1024], None)
    assert large > 12 * small


def test_peak_is_linear_over_ranks():
    small, large = (run_ranks(2, peak_bytes_of, KINDS, seq_len) for seq_len in (1024, 8192))
    for rank in range(2):
        for kind in KINDS:
            assert large[rank][kind] <= 1.3 * 8 * small[rank][kind], (kind, small, large)
