"""Parameters and FLOPs of a model shape, computed from its configuration alone, without torch.

Conventions. A multiply-add is 2 FLOPs. Only matrix products are counted; norms, activations, softmax and the
embedding look-up are not (well below 1% of them). Backward costs twice forward. Recomputed activations
are not counted: a share of peak made from these numbers is MFU, not HFU (Chowdhery et al. 2022, appendix B).
"""

from __future__ import annotations

from typing import Literal

from megallama.config.schema import ModelConfig
from megallama.grid import padded_vocab_size

Attention = Literal["full", "causal"]
"""Which score entries count: `full`, all seq_len x seq_len; `causal`, those on and below the diagonal."""


def layer_matrix_parameters(model: ModelConfig) -> int:
    """Weights of one layer that enter a matrix product: qkv, attention output, gate, up and down."""
    attention = model.hidden_size * (model.qkv_width + model.query_width)
    return attention + 3 * model.hidden_size * model.ffn_hidden_size


def layer_vector_sizes(model: ModelConfig) -> list[int]:
    """Sizes of the vectors of one layer: two norms, and where the model has them qkv bias, q norm and k norm."""
    sizes = [model.hidden_size, model.hidden_size]
    if model.qkv_bias:
        sizes.append(model.qkv_width)
    if model.qk_norm:
        sizes += [model.head_width] * 2
    return sizes


def count_parameters(model: ModelConfig, *, padded: bool) -> int:
    """Trainable parameters. Tied embeddings count once.

    Args:
        model: The shape.
        padded: With the rows that pad the vocabulary (what is in memory), or without (what papers state).
    """
    rows = padded_vocab_size(model.vocab_size, multiple=model.vocab_multiple) if padded else model.vocab_size
    embeddings = rows * model.hidden_size * (1 if model.tie_embeddings else 2)
    layer = layer_matrix_parameters(model) + sum(layer_vector_sizes(model))
    return model.num_layers * layer + model.hidden_size + embeddings


def train_flops_per_token(model: ModelConfig, *, seq_len: int, attention: Attention = "causal") -> float:
    """FLOPs of forward and backward of one token in a sequence of `seq_len` tokens.

    A weight of a matrix product takes one multiply-add a token: 2 FLOPs forward, 4 backward, 6 in all. With
    P such weights (all layers and the output layer over the unpadded vocabulary, tied or not):

        6 P + 12 x num_layers x num_heads x head_dim x (attended positions)

    In the attention term each score is a dot product of head_dim (2 head_dim FLOPs) and each probability
    scales one value vector (again 2 head_dim): 4 forward, 12 with backward, a head and attended position.
    `full` attends to seq_len positions; `causal` to (seq_len + 1) / 2 on average, as position t sees t + 1.

    `full` is the convention of Megatron-LM's papers (Narayanan et al. 2021, equation 3) and PaLM's MFU;
    `causal` is what a flash kernel computes. Documents packed into one sequence count as one.
    """
    matrices = model.num_layers * layer_matrix_parameters(model) + model.vocab_size * model.hidden_size
    positions = float(seq_len) if attention == "full" else (seq_len + 1) / 2
    return 6.0 * matrices + 12.0 * model.num_layers * model.query_width * positions
