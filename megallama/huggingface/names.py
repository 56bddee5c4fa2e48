"""The correspondence of tensors: each canonical tensor consists of whole rows of Hugging Face's tensors.

Query, key and value of a key/value head lie side by side in our fused matrix; the embedding has more rows than
the vocabulary. Columns never differ, and both sides rotate the halves of a head, so rows only change places.
"""

from __future__ import annotations

from dataclasses import dataclass

from megallama.config.schema import ModelConfig
from megallama.grid import padded_vocab_size

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `start + count` of the tensor `name`."""

    name: str
    start: int
    count: int


@dataclass(frozen=True)
class Made:
    """A tensor of `shape` whose rows are `parts`, one after the other, and zeros after them."""

    shape: tuple[int, ...]
    parts: tuple[Rows, ...]


def canonical_tensors(model: ModelConfig) -> dict[str, Made]:
    """Our tensors out of Hugging Face's."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    rows = padded_vocab_size(model.vocab_size, multiple=model.vocab_multiple)
    width = model.head_width
    made = {"embedding.word_embeddings.weight": Made((rows, hidden), (Rows(EMBEDDING, 0, model.vocab_size),))}
    for layer in range(model.num_layers):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        whole = {
            "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight", (hidden,)),
            "self_attention.linear_proj.weight": ("self_attn.o_proj.weight", (hidden, model.query_width)),
            "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight", (hidden,)),
            "mlp.linear_fc1.weight_w": ("mlp.gate_proj.weight", (ffn, hidden)),
            "mlp.linear_fc1.weight_v": ("mlp.up_proj.weight", (ffn, hidden)),
            "mlp.linear_fc2.weight": ("mlp.down_proj.weight", (hidden, ffn)),
        }
        if model.qk_norm:
            whole["self_attention.q_layernorm.weight"] = ("self_attn.q_norm.weight", (width,))
            whole["self_attention.k_layernorm.weight"] = ("self_attn.k_norm.weight", (width,))
        for name, (source, shape) in whole.items():
            made[f"{ours}.{name}"] = Made(shape, (Rows(f"{theirs}.{source}", 0, shape[0]),))
        for kind in ("weight", "bias") if model.qkv_bias else ("weight",):
            parts = _fused_rows(model, f"{theirs}.self_attn", kind)
            height = sum(part.count for part in parts)
            shape = (height, hidden) if kind == "weight" else (height,)
            made[f"{ours}.self_attention.linear_qkv.{kind}"] = Made(shape, parts)
    made["decoder.final_layernorm.weight"] = Made((hidden,), (Rows("model.norm.weight", 0, hidden),))
    if not model.tie_embeddings:
        made["output_layer.weight"] = Made((rows, hidden), (Rows(OUTPUT, 0, model.vocab_size),))
    return made


def _fused_rows(model: ModelConfig, prefix: str, kind: str) -> tuple[Rows, ...]:
    """Rows of the fused matrix: for each key/value head its query heads, the key, the value."""
    groups, width = model.kv_heads, model.head_width
    queries = model.num_heads // groups * width
    parts = []
    for group in range(groups):
        parts.append(Rows(f"{prefix}.q_proj.{kind}", group * queries, queries))
        parts.append(Rows(f"{prefix}.k_proj.{kind}", group * width, width))
        parts.append(Rows(f"{prefix}.v_proj.{kind}", group * width, width))
    return tuple(parts)


def hugging_face_tensors(model: ModelConfig) -> dict[str, Made]:
    """Hugging Face's tensors out of ours: the same rows read the other way; padding rows are left out."""
    pieces: dict[str, list[tuple[int, Rows]]] = {}
    columns: dict[str, tuple[int, ...]] = {}
    for key, made in canonical_tensors(model).items():
        position = 0
        for part in made.parts:
            pieces.setdefault(part.name, []).append((part.start, Rows(key, position, part.count)))
            columns[part.name] = made.shape[1:]
            position += part.count
    tensors = {}
    for name, found in pieces.items():
        parts = tuple(rows for _, rows in sorted(found, key=lambda piece: piece[0]))
        tensors[name] = Made((sum(part.count for part in parts), *columns[name]), parts)
    return tensors
