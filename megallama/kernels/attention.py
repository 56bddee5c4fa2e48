"""Core attention: softmax(q k^T / sqrt(d)) v with a causal mask, behind one signature.

Shapes: B sequences, N query heads, K key/value heads (N a multiple of K), S positions, D head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

AttentionFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def attention_reference(
    q_BNSD: torch.Tensor, k_BKSD: torch.Tensor, v_BKSD: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention with the S x S matrix in memory; the oracle of the fused forms. Returns BNSD.

    The softmax runs in fp32 at least.
    """
    repeats = q_BNSD.size(1) // k_BKSD.size(1)
    k_BNSD = k_BKSD.repeat_interleave(repeats, dim=1)
    v_BNSD = v_BKSD.repeat_interleave(repeats, dim=1)
    score_BNSS = (q_BNSD @ k_BNSD.transpose(-1, -2)) * scale
    size = q_BNSD.size(2)
    future_SS = torch.ones(size, size, dtype=torch.bool, device=q_BNSD.device).triu(1)
    score_BNSS = score_BNSS.masked_fill(future_SS, float("-inf"))
    accumulate = torch.promote_types(q_BNSD.dtype, torch.float32)
    return score_BNSS.softmax(-1, dtype=accumulate).to(v_BNSD.dtype) @ v_BNSD


def attention_sdpa(
    q_BNSD: torch.Tensor, k_BKSD: torch.Tensor, v_BKSD: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention on torch's fused kernels (flash on CPU; flash, cuDNN or efficient on CUDA). Returns BNSD."""
    grouped = q_BNSD.size(1) != k_BKSD.size(1)
    return F.scaled_dot_product_attention(
        q_BNSD, k_BKSD, v_BKSD, is_causal=True, scale=scale, enable_gqa=grouped
    )


BACKENDS: dict[str, AttentionFunction] = {"sdpa": attention_sdpa, "reference": attention_reference}
"""In the order in which `auto` prefers them."""


def choose_attention(name: str) -> tuple[str, AttentionFunction]:
    """The backend called `name`, or the first one for `auto`. Both run on every device that torch knows."""
    chosen = next(iter(BACKENDS)) if name == "auto" else name
    return chosen, BACKENDS[chosen]
