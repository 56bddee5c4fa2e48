"""LLaMA in plain torch and fp64, written from the papers for the tests alone: the oracle of the one-process run.

Every layout is compared with one process; this is what one process is compared with. It shares no code with
megallama: only names and shapes of the canonical weights. Sequence after sequence, head after head, mask written out.

RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), rotary embedding (Su et al. 2021, arXiv:2104.09864), SwiGLU
(Shazeer 2020, arXiv:2002.05202), grouped queries (Ainslie et al. 2023, arXiv:2305.13245).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

Weights = Mapping[str, torch.Tensor]


def loss_sum(
    weights: Weights,
    model: Any,
    *,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    documents: Sequence[int],
) -> torch.Tensor:
    """Sum of the counted token losses of one sequence.

    Args:
        weights: Canonical tensors, fp64.
        model: Shape of the model.
        tokens: [S].
        labels: [S].
        mask: [S], 1 where the label counts.
        positions: [S], for the rotary embedding.
        documents: Where documents start in the sequence.
    """
    table = weights["embedding.word_embeddings.weight"]
    x = table[tokens]
    size = len(tokens)
    document = torch.tensor([sum(start <= place for start in documents) for place in range(size)])
    is_seen = (document[:, None] == document[None, :]) & (
        torch.arange(size)[:, None] >= torch.arange(size)[None, :]
    )
    for layer in range(model.num_layers):
        name = f"decoder.layers.{layer}."
        normed = rms_norm(x, weights[f"{name}self_attention.linear_qkv.layer_norm_weight"], model.norm_eps)
        heads = attention(
            normed, weights[f"{name}self_attention.linear_qkv.weight"], model, positions, is_seen
        )
        x = x + heads @ weights[f"{name}self_attention.linear_proj.weight"].T
        normed = rms_norm(x, weights[f"{name}mlp.linear_fc1.layer_norm_weight"], model.norm_eps)
        gate = normed @ weights[f"{name}mlp.linear_fc1.weight_w"].T
        up = normed @ weights[f"{name}mlp.linear_fc1.weight_v"].T
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ weights[f"{name}mlp.linear_fc2.weight"].T
    x = rms_norm(x, weights["decoder.final_layernorm.weight"], model.norm_eps)
    logits = x @ (table if model.tie_embeddings else weights["output_layer.weight"]).T
    losses = torch.logsumexp(logits, dim=-1) - logits[torch.arange(size), labels]
    return (losses * mask).sum()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def attention(
    x: torch.Tensor, qkv: torch.Tensor, model: Any, positions: torch.Tensor, is_seen: torch.Tensor
) -> torch.Tensor:
    """All heads side by side, [S, num_heads x D]; qkv holds, group by group, its query heads, its key, its value."""
    width = model.head_dim or model.hidden_size // model.num_heads
    groups = model.num_kv_heads or model.num_heads
    queries = model.num_heads // groups
    outputs = []
    for rows in qkv.view(groups, (queries + 2) * width, -1):
        *q_rows, k_rows, v_rows = rows.split(width)
        key, value = rotate(x @ k_rows.T, model, positions), x @ v_rows.T
        for q_row in q_rows:
            score = rotate(x @ q_row.T, model, positions) @ key.T / math.sqrt(width)
            weight = torch.where(is_seen, score, -torch.inf).softmax(-1)
            outputs.append(weight @ value)
    return torch.cat(outputs, dim=-1)


def rotate(x: torch.Tensor, model: Any, positions: torch.Tensor) -> torch.Tensor:
    """Channels i and i + D/2 as the two coordinates of a point, turned by position x frequency i."""
    half = x.size(-1) // 2
    angles = [[angle(model, int(place), i, half) for i in range(half)] for place in positions]
    turn = torch.tensor(angles, dtype=torch.float64)
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * turn.cos() - b * turn.sin(), b * turn.cos() + a * turn.sin()], dim=-1)


def angle(model: Any, place: int, i: int, half: int) -> float:
    frequency = model.rope_theta ** (-i / half)
    scaling = model.rope_scaling.value
    if scaling == "linear":
        frequency /= model.rope_scaling_factor
    elif scaling == "llama3":
        # Fewer than 1 turn in the original context: stretched; more than 4: kept; between: blended.
        turns = model.rope_original_max_seq_len * frequency / (2 * math.pi)
        kept = min(1.0, max(0.0, (turns - 1) / 3))
        frequency = kept * frequency + (1 - kept) * frequency / model.rope_scaling_factor
    return place * frequency
