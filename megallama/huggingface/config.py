"""Translation between a Hugging Face `config.json` and our model configuration.

Which keys there are, and which of them matter, stands in `config_keys.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from megallama.config.check_values import (
    check_heads,
    check_numbers_are_finite,
    check_ranges,
    check_rope,
    check_sizes_are_positive,
)
from megallama.config.rope_scaling import RAMPS, SETTINGS
from megallama.config.same_model import differing_settings
from megallama.config.schema import ModelConfig, OptimConfig, RopeScaling, RunConfig, TrainConfig
from megallama.config.typed import Problems, build, plain
from megallama.host.errors import UserError
from megallama.huggingface.config_keys import (
    ARCHITECTURES,
    OTHERS,
    ROPE_HARMLESS,
    ROPE_KEY_OF,
    ROPE_KEYS_OF,
    SIZES,
    key_problems,
    unknown_keys,
    without_ignored,
)

_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
}
"""What transformers takes where config.json lacks a key, beside what all families share."""

SHARED_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02}


def model_from_hugging_face(
    config: Mapping[str, Any],
    *,
    name: str,
    vocab_multiple: int = 128,
    origin: str = "config.json",
    ignored: Collection[str] = (),
) -> ModelConfig:
    """The model that a `config.json` describes.

    Args:
        config: Its content.
        name: Name of the shape.
        vocab_multiple: `model.vocab_multiple`.
        origin: Where it was read, for messages.
        ignored: Unknown keys that the user accepts.

    Raises:
        UserError: another architecture, an `ignored` key that is not there or is known, or keys and values that are
            not supported, all of them by name.
    """
    family = config.get("model_type")
    if family not in ARCHITECTURES:
        raise UserError(
            f"{origin}: model_type ({family!r}) is not supported: it must be one of {', '.join(ARCHITECTURES)}"
        )
    config = without_ignored(config, ignored, origin=origin)
    given = {**SHARED_DEFAULTS, **DEFAULTS[family], **config}
    problems = [f"{key} is missing" for key in SIZES if config.get(key) is None]
    problems += key_problems(given, family=family)
    values = {ours: given[theirs] for theirs, ours in (SIZES | OTHERS).items() if theirs in given}
    values |= _rope_settings(given, problems=problems)
    values |= {
        "name": name,
        "vocab_multiple": vocab_multiple,
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
    }
    if not problems:
        found = Problems()
        model = build(ModelConfig, values, problems=found, key="model", origin=origin)
        problems = [*found.messages, *(f"{key} is missing" for key in found.missing)]
        problems = problems or _shape_problems(model)
        if not problems and model is not None:
            return model
    unknown = unknown_keys(given, family=family)
    remedy = "choose another one"
    if unknown:
        flags = " ".join(f"--ignore-key {key}" for key in unknown)
        remedy += f", or import it with {flags} if that changes nothing in what the model computes"
    raise UserError(f"{origin} describes a model that is not supported ({'; '.join(problems)}): {remedy}")


def _rope_settings(config: Mapping[str, Any], *, problems: list[str]) -> dict[str, Any]:
    """Our settings of the rotary embedding, from either form: `rope_parameters`, or `rope_theta` and `rope_scaling`."""
    forms = [config.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(form, Mapping) for form in forms):
        problems.append("rope_scaling and rope_parameters must be objects or null")
        return {}
    # null is what a key is that was not set
    rope, newer = (
        {key: value for key, value in form.items() if value is not None and key not in ROPE_HARMLESS}
        for form in forms
    )
    for part in (rope, newer):
        if "type" in part:  # the oldest name
            part.setdefault("rope_type", part["type"])
            del part["type"]
    if rope and newer and any(newer.get(key, value) != value for key, value in rope.items()):
        problems.append("rope_scaling and rope_parameters disagree")
    rope |= newer
    theta = rope.pop("rope_theta", None)
    if None not in (theta, config.get("rope_theta")) and theta != config["rope_theta"]:
        problems.append("rope_theta and rope_parameters disagree")
    if rope.pop("partial_rotary_factor", 1) not in (1, None):
        problems.append("partial_rotary_factor other than 1 is not supported")
    kind = rope.pop("rope_type", "default")
    settings: dict[str, Any] = {
        "rope_theta": next(
            (value for value in (theta, config.get("rope_theta")) if value is not None), 10000.0
        )
    }
    if kind not in ROPE_KEYS_OF:
        problems.append(f"rope_type {kind!r} is not supported, only {', '.join(ROPE_KEYS_OF)}")
        return settings
    problems += [f"{key} of the {kind} rope is unknown" for key in rope if key not in ROPE_KEYS_OF[kind]]
    if kind != "default" and not _is_number(rope.get("factor")):
        problems.append(f"factor of the {kind} rope ({rope.get('factor')!r}) must be a number")
        return settings
    return settings | _scaling_settings(kind, rope, config, problems=problems)


def _scaling_settings(
    kind: str, rope: Mapping[str, Any], config: Mapping[str, Any], *, problems: list[str]
) -> dict[str, Any]:
    if kind == "default":
        return {}
    context = config["max_position_embeddings"]
    settings: dict[str, Any] = {"rope_scaling": kind, "rope_scaling_factor": rope["factor"]}
    if kind == "linear":
        return settings
    original = rope.get("original_max_position_embeddings") or context
    settings["rope_original_max_seq_len"] = original
    if kind == "llama3":
        wanted = [ROPE_KEY_OF[name] for name in RAMPS[RopeScaling.llama3]]
        problems += [f"{key} of the llama3 rope is missing" for key in wanted if rope.get(key) is None]
        return settings | {f"rope_{key}": rope[key] for key in wanted if rope.get(key) is not None}
    if isinstance(context, int) and isinstance(original, int) and context == original:
        # Such files state the context before it was stretched.
        settings["max_seq_len"] = int(context * rope["factor"])
    if kind == "yarn":
        if rope.get("truncate") not in (None, True):
            problems.append(f"truncate of the yarn rope is {rope['truncate']!r}, only true is supported")
        ramp = [ROPE_KEY_OF[name] for name in RAMPS[RopeScaling.yarn]]
        settings |= {f"rope_{key}": rope[key] for key in ramp if rope.get(key)}
        settings["rope_attention_factor"] = _attention_factor(rope, problems=problems)
    return settings


def _attention_factor(rope: Mapping[str, Any], *, problems: list[str]) -> Any:
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    over, under = rope.get("mscale"), rope.get("mscale_all_dim")
    if not over or not under:
        return None
    if not _is_number(over) or not _is_number(under) or rope["factor"] < 1:
        problems.append(f"mscale ({over!r}) and mscale_all_dim ({under!r}) of the yarn rope must be numbers")
        return None
    return (0.1 * over * math.log(rope["factor"]) + 1) / (0.1 * under * math.log(rope["factor"]) + 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shape_problems(model: ModelConfig | None) -> list[str]:
    assert model is not None
    train = TrainConfig(steps=1, run_dir=".", seq_len=1, global_batch_size=1)
    config = RunConfig(model=model, train=train, optim=OptimConfig(lr=1.0))
    problems = [*check_sizes_are_positive(config), *check_numbers_are_finite(config)]
    return problems or [*check_ranges(config), *check_heads(config), *check_rope(config)]


def hugging_face_config(
    model: ModelConfig, *, dtype: str, bos_id: int | None, eos_id: int | None
) -> dict[str, Any]:
    """The `config.json` of a model, in the form that every version of transformers reads.

    Raises:
        UserError: no family has this combination.
    """
    family = _family(model)
    context = model.max_seq_len
    if model.rope_scaling is RopeScaling.dynamic:
        # transformers takes the context before it is stretched from here.
        context = model.rope_original_max_seq_len
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        **{theirs: getattr(model, ours) for theirs, ours in (SIZES | OTHERS).items()},
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_width,
        "max_position_embeddings": context,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rope_theta": model.rope_theta,
        "rope_scaling": _rope_scaling(model),
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if family == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    elif family == "mistral":
        config["sliding_window"] = None
    else:
        config |= {"use_sliding_window": False, "sliding_window": None}
    if family == "qwen3":
        config["attention_bias"] = False
    return config


def _family(model: ModelConfig) -> str:
    if model.qkv_bias and model.qk_norm:
        raise UserError(
            "model.qkv_bias with model.qk_norm (true, true) is no model family of transformers:"
            " the model cannot be exported"
        )
    if model.qkv_bias:
        return "qwen2"
    if model.qk_norm:
        return "qwen3"
    # transformers' LLaMA insists that heads divide the hidden width, even where head_dim is given.
    return "llama" if model.hidden_size % model.num_heads == 0 else "mistral"


def _rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    kind = model.rope_scaling
    if kind is RopeScaling.none:
        return None
    values = {ROPE_KEY_OF[name]: getattr(model, name) for name in SETTINGS[kind]}
    kept = {
        key: value for key, value in values.items() if key in ROPE_KEYS_OF[kind.value] and value is not None
    }
    return {"rope_type": kind.value, **kept}


def same_model(one: ModelConfig, other: ModelConfig) -> list[str]:
    """Keys in which two shapes differ that compute something else; how far the vocabulary is padded does not matter."""
    differing = differing_settings(plain(one), plain(other))
    return [
        f"model.{key} ({first} and {second})"
        for key, (first, second) in differing.items()
        if key != "vocab_multiple"
    ]
