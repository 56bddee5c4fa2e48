"""The packing for Transformer Engine, against a stand-in with its interface; and its refusal where it is not there."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from megallama.host.errors import UserError
from megallama.kernels.attention import transformer_engine
from megallama.kernels.attention.core import choose_attention, masked_attention
from megallama.kernels.attention.transformer_engine import TransformerEngineAttention

SCALE = 0.3
made: list[tuple[Any, ...]] = []


class DotProductAttention:
    """What Transformer Engine's module of this name does with packed documents, by the formula."""

    def __init__(self, heads: int, width: int, **settings: Any) -> None:
        made.append((heads, width, settings["num_gqa_groups"]))
        self.scale = settings["softmax_scale"]
        assert settings["attention_dropout"] == 0.0 and settings["attn_mask_type"] == "padding_causal"

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **packing: Any) -> torch.Tensor:
        """[tokens, N, D] and [tokens, K, D] to [tokens, N x D]."""
        assert packing["qkv_format"] == "thd" and all(t.is_contiguous() for t in (q, k, v))
        offsets = packing["cu_seqlens_q"]
        assert offsets.dtype == torch.int32 and torch.equal(offsets, packing["cu_seqlens_kv"])
        begins = offsets.tolist()
        assert begins[0] == 0 and begins[-1] == q.size(0)
        lengths = [end - begin for begin, end in zip(begins, begins[1:], strict=False)]
        assert packing["max_seqlen_q"] == packing["max_seqlen_kv"] == max(lengths)
        parts = []
        for begin, length in zip(begins, lengths, strict=False):
            one = [t[begin : begin + length].unsqueeze(1) for t in (q, k, v)]
            parts.append(masked_attention(*one, scale=self.scale).squeeze(1))
        return torch.cat(parts).flatten(1)


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> TransformerEngineAttention:
    """The backend on a machine that seems to have the library."""
    library, pytorch = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    pytorch.DotProductAttention = DotProductAttention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", library)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", pytorch)
    monkeypatch.setattr(transformer_engine, "require", lambda setting, name: None)
    chosen = choose_attention("te")
    assert isinstance(chosen, TransformerEngineAttention)
    return chosen


@pytest.mark.parametrize(
    "documents", [None, ((0,), (0,)), ((0, 3, 4), (0, 11)), ((0, 1, 2, 23), (0,))], ids=str
)
def test_documents_stay_apart(attention: TransformerEngineAttention, documents: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 2, heads, 8) for heads in (4, 2, 2)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    copies = [t.detach().clone().requires_grad_() for t in tensors]
    got = attention(*tensors, scale=SCALE, documents=documents)
    wanted = masked_attention(*copies, scale=SCALE, documents=documents)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    weight = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    (got * weight).sum().backward()
    (wanted * weight).sum().backward()
    for mine, theirs in zip(tensors, copies, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_one_module_for_all_layers(attention: TransformerEngineAttention) -> None:
    made.clear()
    q, k = torch.zeros(8, 1, 4, 8), torch.zeros(8, 1, 2, 8)
    for _ in range(3):
        attention(q, k, k, scale=SCALE)
    assert made == [(4, 8, 2)]


def test_without_the_library_it_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"kernels.attention \(te\) cannot run: .*; use kernels.attention=auto"
    ):
        choose_attention("te")
