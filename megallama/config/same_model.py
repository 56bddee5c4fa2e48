"""Decides whether two model shapes are the same model, by comparing what their settings mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from megallama.config.rope_scaling import unread_settings, yarn_attention_factor
from megallama.config.schema import ModelConfig, RopeScaling
from megallama.config.typed import optional

NOT_OF_THE_SHAPE = {"name", "hidden_dropout", "init_std", "max_seq_len"}
"""Model settings that may change between the runs of one checkpoint."""

WITHOUT_WEIGHTS = {
    "norm_eps",
    *(name for name in ModelConfig.__dataclass_fields__ if name.startswith("rope_")),
}
"""Settings that change neither the shapes nor the meaning of weights, only what is computed with them: a run that
starts from other weights (a longer context, say) may have its own."""


def differing_settings(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings of `model.*` (plain values by name) in which two shapes are not the same model, with both values.

    A setting that a side lacks has its default (the program that wrote it knew no other), null stands for what it
    means, and what neither side's kind of rope looks at does not count.
    """
    first, second = _explicit(one), _explicit(other)
    ignored = NOT_OF_THE_SHAPE | _without_effect(first, second)
    if _padded_vocabulary(first) == _padded_vocabulary(second) is not None:
        ignored |= {"vocab_multiple"}
    absent = "nothing"
    return {
        key: (first.get(key, absent), second.get(key, absent))
        for key in sorted(first.keys() | second.keys())
        if key not in ignored and first.get(key, absent) != second.get(key, absent)
    }


def _explicit(settings: Mapping[str, Any]) -> dict[str, Any]:
    whole = {**optional(ModelConfig), **settings}
    heads, width, factor = (whole.get(key) for key in ("num_heads", "hidden_size", "rope_scaling_factor"))
    if whole["num_kv_heads"] is None:
        whole["num_kv_heads"] = heads
    if whole["head_dim"] is None and _is_count(heads) and _is_count(width):
        whole["head_dim"] = width // heads
    if whole["rope_scaling"] == "yarn" and whole["rope_attention_factor"] is None and _is_positive(factor):
        whole["rope_attention_factor"] = yarn_attention_factor(factor)
    return whole


def _without_effect(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    try:
        kinds = [RopeScaling(settings["rope_scaling"]) for settings in (one, other)]
    except ValueError:  # of another program
        return set()
    return unread_settings(*kinds)


def _padded_vocabulary(settings: Mapping[str, Any]) -> int | None:
    size, multiple = settings.get("vocab_size"), settings["vocab_multiple"]
    return math.ceil(size / multiple) * multiple if _is_count(size) and _is_count(multiple) else None


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and value > 0


def _is_positive(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and value > 0
