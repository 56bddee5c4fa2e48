"""Parameter and FLOP counts against published sizes, a built model, and torch's own FLOP counter."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from megallama.config.schema import ModelConfig
from megallama.model.counts import count_parameters, train_flops_per_token

LLAMA2_7B = ModelConfig(
    name="llama2_7b",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_heads=32,
    vocab_size=32000,
    max_seq_len=4096,
)
LLAMA3_8B = dataclasses.replace(
    LLAMA2_7B, name="llama3_8b", ffn_hidden_size=14336, num_kv_heads=8, vocab_size=128256
)
SMALL = ModelConfig(
    name="small",
    num_layers=3,
    hidden_size=32,
    ffn_hidden_size=80,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=100,
    vocab_multiple=64,
    max_seq_len=64,
)


def test_published_sizes() -> None:
    # From the models' cards on the hub (safetensors' total): 6,738,415,616 and 8,030,261,248.
    assert count_parameters(LLAMA2_7B, padded=False) == 6_738_415_616
    assert count_parameters(LLAMA3_8B, padded=False) == 8_030_261_248


def test_padding_adds_rows_to_each_embedding() -> None:
    added = count_parameters(SMALL, padded=True) - count_parameters(SMALL, padded=False)
    assert added == 2 * 28 * SMALL.hidden_size
    tied = dataclasses.replace(SMALL, tie_embeddings=True)
    assert (
        count_parameters(tied, padded=True) - count_parameters(tied, padded=False) == 28 * SMALL.hidden_size
    )


@pytest.mark.parametrize("tie", [False, True])
def test_parameters_and_flops_of_the_same_model_in_transformers(tie: bool) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SMALL.vocab_size,
        hidden_size=SMALL.hidden_size,
        intermediate_size=SMALL.ffn_hidden_size,
        num_hidden_layers=SMALL.num_layers,
        num_attention_heads=SMALL.num_heads,
        num_key_value_heads=SMALL.num_kv_heads,
        tie_word_embeddings=tie,
        attn_implementation="eager",
    )
    peer = LlamaForCausalLM(config)
    shape = dataclasses.replace(SMALL, tie_embeddings=tie)
    assert count_parameters(shape, padded=False) == sum(p.numel() for p in peer.parameters())

    seq_len = 16
    tokens = torch.arange(2 * seq_len).view(2, seq_len)
    with FlopCounterMode(display=False) as counter:
        peer(tokens, labels=tokens).loss.backward()
    counted = counter.get_total_flops() / tokens.numel()
    expected = train_flops_per_token(shape, seq_len=seq_len, attention="full")
    # The rotary table is a small matrix product as well; it is no part of the convention.
    assert counted == pytest.approx(expected, rel=2e-3)
    assert counted >= expected


def test_causal_counts_the_lower_triangle() -> None:
    seq_len = 8
    base = train_flops_per_token(SMALL, seq_len=0, attention="full")
    full = train_flops_per_token(SMALL, seq_len=seq_len, attention="full") - base
    causal = train_flops_per_token(SMALL, seq_len=seq_len, attention="causal") - base
    entries = sum(1 for row in range(seq_len) for column in range(seq_len) if column <= row)
    assert causal / full == pytest.approx(entries / seq_len**2)


def test_head_dim_may_differ_from_hidden_size() -> None:
    wide = dataclasses.replace(SMALL, head_dim=16)
    # q and output grow from 32x32 to 32x64, k and v from 32x16 to 32x32 a layer.
    grown = SMALL.num_layers * 32 * (2 * 32 + 2 * 16)
    assert count_parameters(wide, padded=True) - count_parameters(SMALL, padded=True) == grown


def test_counting_needs_no_torch() -> None:
    program = "import sys, megallama.model.counts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
