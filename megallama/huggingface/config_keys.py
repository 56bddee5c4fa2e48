"""The keys of a Hugging Face `config.json`: which are translated, which must have a certain value, which do not matter.

Any other key is a mistake: if it were dropped in silence, the model might compute something else than it should.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from megallama.config.rope_scaling import SETTINGS
from megallama.host.errors import UserError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
}
"""`model_type` of the families and their class in transformers."""

SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_heads",
    "vocab_size": "vocab_size",
}
"""Keys that every config.json must have, and our names."""

OTHERS = {
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
}

_TRANSLATED = {"model_type", "architectures", "rope_theta", "rope_scaling", "rope_parameters", "layer_types"}
_TRANSLATED |= {"sliding_window", *SIZES, *OTHERS}

_OFF = (False, None)
REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": _OFF,
    "mlp_bias": _OFF,
    "attention_dropout": (0, None),
    "use_sliding_window": _OFF,
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": _OFF,
    "is_encoder_decoder": _OFF,
    "add_cross_attention": _OFF,
    "cross_attention_hidden_size": (None,),
    "chunk_size_feed_forward": (0, None),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": _OFF,
    "auto_map": (None,),
    "residual_dropout": (0, None),
    "embedding_dropout": (0, None),
    "hidden_dropout": (0, None),
    "hidden_dropout_prob": (0, None),
    "attention_probs_dropout_prob": (0, None),
    "attn_dropout": (0, None),
    "attn_pdrop": (0, None),
    "resid_pdrop": (0, None),
    "embd_pdrop": (0, None),
    "dropout": (0, None),
    "add_bias_linear": _OFF,
    "alibi": _OFF,
    "use_alibi": _OFF,
    "use_mrope": _OFF,
    "use_dynamic_ntk": _OFF,
    "use_logn_attn": _OFF,
    "use_parallel_residual": _OFF,
    "parallel_attn": _OFF,
    "rope_ratio": (1, None),
    "logit_scale": (1, None),
    "logits_scaling": (1, None),
    "embedding_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "no_rope_layers": ([], None),
}
"""Keys whose other values would be another model than ours, and the values that are ours."""

HARMLESS = {
    "torch_dtype": "each tensor says its own format",
    "dtype": "each tensor says its own format",
    "_name_or_path": "where the file came from",
    "_commit_hash": "where the file came from",
    "use_cache": "how transformers generates",
    "max_window_layers": "only used with a sliding window, which is refused",
    "max_sequence_length": "a note of early LLaMA files, which transformers does not read",
    "model_max_length": "for the tokenizer",
    "tokenizer_class": "for the tokenizer",
    "output_attentions": "what transformers returns",
    "output_hidden_states": "what transformers returns",
    "return_dict": "what transformers returns",
    "is_decoder": "our families always are",
    "torchscript": "how transformers is traced",
    "use_bfloat16": "for TensorFlow",
    "tf_legacy_loss": "for TensorFlow",
    "id2label": "only for classification",
    "label2id": "only for classification",
    "problem_type": "only for classification",
    "finetuning_task": "a note",
    "task_specific_params": "a note",
    "prefix": "a note",
    "gradient_checkpointing": "how training saves memory",
    "is_llama_config": "a note of some early LLaMA files",
    "transformers.js_config": "for a browser",
    "unsloth_fixed": "a note of the program that wrote the file",
    "model_name": "a note",
    "library_name": "a note",
    "license": "a note",
}
"""Keys that change nothing of what is computed, each with the reason."""

_SAMPLING = frozenset(
    (
        *("temperature", "top_k", "top_p", "typical_p", "do_sample", "early_stopping", "diversity_penalty"),
        *(
            "max_length",
            "max_new_tokens",
            "min_length",
            "num_beams",
            "num_beam_groups",
            "num_return_sequences",
        ),
        *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
        *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "exponential_decay_length_penalty"),
        *("output_scores", "return_dict_in_generate", "remove_invalid_values"),
    )
)
"""How transformers draws tokens: older files hold it here instead of in generation_config.json."""

_TOKEN_ID = re.compile(r".*_token_(id|ids|index)")
"""The tokenizer says its ids; generation_config.json is kept."""

_KERNEL = re.compile(r"_experts_implementation.*|_attn_implementation_autoset|_?(use_)?flash_att(entio)?n\w*")
"""Which kernel computes it."""

_ATTENTION_KERNEL = re.compile(r"_?attn_implementation(_internal)?")
_SAME_ATTENTION = re.compile(r"(paged\|)?(eager|sdpa|flex_attention|flash_attention_\d)")
"""Kernels of transformers that compute the same attention."""

_PROGRAM_VERSION = re.compile(
    r"_?(transformers|unsloth|unsloth_zoo|peft|trl|axolotl|mlx|mlx_lm|torch|pytorch|flash_attn|accelerate|optimum"
    r"|safetensors|tokenizers|huggingface_hub|llama_factory|llamafactory|deepspeed|megatron|vllm|autoawq|gptqmodel"
    r"|adapter_transformers|cuda|python)_version"
)
"""Notes of the programs that wrote the file."""

_SWITCH = re.compile(r"(use|enable|with)_\w+")
_PARTS = re.compile(
    r"rope|rotary|pos|alibi|norm|(^|_)(rms|ln|ffn)|causal|resid|skip|gat(e|ing)|glu|silu|swish|activation|bias|gqa"
    r"|group|kv|head|mlp|att(entio)?n|softmax|mask|tie|embed|vocab|logit|scal|layer|weight|linear|proj"
)
"""Words of parts of a model: a switch that turns one off may be another model, if ours has the part."""

ROPE_KEY_OF = {
    "rope_scaling_factor": "factor",
    "rope_original_max_seq_len": "original_max_position_embeddings",
    **{f"rope_{key}": key for key in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")},
    "rope_attention_factor": "attention_factor",
}
"""Our settings of a kind of rotary scaling, and the keys of `rope_parameters` (in older files `rope_scaling`)."""

ROPE_KEYS_OF = {
    "default": (),
    **{kind.value: tuple(ROPE_KEY_OF[name] for name in names) for kind, names in SETTINGS.items() if names},
}
"""Keys of `rope_parameters` for each kind."""
ROPE_KEYS_OF["yarn"] += ("mscale", "mscale_all_dim", "truncate")
ROPE_KEYS_OF["dynamic"] = ("factor",)  # transformers takes the original context from max_position_embeddings

ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *sum(ROPE_KEYS_OF.values(), ())}
"""Keys of `rope_parameters` that some kind reads."""

ROPE_HARMLESS = {"finetuned": "a note of YaRN's authors"}
"""Keys of `rope_parameters` that change nothing."""


def is_without_effect(key: str, value: Any, *, family: str) -> bool:
    """Whether an untranslated key cannot change what a model of the `family` computes."""
    if key in REQUIRED:
        return value in REQUIRED[key]
    if key in HARMLESS or key in _SAMPLING or _TOKEN_ID.fullmatch(key) or _KERNEL.fullmatch(key):
        return True
    if value is None:
        return True
    if _PROGRAM_VERSION.fullmatch(key):
        return True
    if _ATTENTION_KERNEL.fullmatch(key):
        return _SAME_ATTENTION.fullmatch(str(value)) is not None
    if key == "version":  # of the file's form
        return value == "1.0"
    if key in ("bias", "use_bias"):
        return value is False and family != "qwen2"
    if key in ("qkv_bias", "use_qkv_bias"):
        return value is (family == "qwen2")
    if key in ("qk_norm", "use_qk_norm"):
        return value is (family == "qwen3")
    return value is False and _SWITCH.fullmatch(key) is not None and not _PARTS.search(key)


def key_problems(config: Mapping[str, Any], *, family: str) -> list[str]:
    """What is wrong with the keys of a `config.json` and the values of those that are only checked."""
    problems = []
    for key, value in config.items():
        if key in _TRANSLATED or is_without_effect(key, value, family=family):
            continue
        if key in REQUIRED:
            problems.append(f"{key} is {value!r}, only {REQUIRED[key][0]!r} is supported")
        else:
            problems.append(f"{key} ({value!r}) is unknown")
    architectures = config.get("architectures")
    wanted = ARCHITECTURES[family]
    if (
        architectures is not None and str(architectures).lower() != str([wanted]).lower()
    ):  # early: LLaMAForCausalLM
        problems.append(f"architectures is {architectures!r}, only [{wanted!r}] is supported")
    # Qwen's files name a window that use_sliding_window=false switches off.
    if family not in ("qwen2", "qwen3") and config.get("sliding_window") is not None:
        problems.append(
            f"sliding_window is {config['sliding_window']!r}, only full attention (null) is supported"
        )
    kinds = config.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        problems.append(f"layer_types is {kinds!r}, only 'full_attention' is supported")
    return problems


def unknown_keys(config: Mapping[str, Any], *, family: str) -> list[str]:
    """The keys that a user may accept by name, as `without_ignored` takes them."""
    unknown = [
        key
        for key, value in config.items()
        if key not in _TRANSLATED and key not in REQUIRED and not is_without_effect(key, value, family=family)
    ]
    for form in ("rope_scaling", "rope_parameters"):
        rope = config.get(form)
        if isinstance(rope, Mapping):
            unknown += [f"{form}.{key}" for key in rope if key not in ROPE_KEYS and key not in ROPE_HARMLESS]
    return unknown


def without_ignored(config: Mapping[str, Any], ignored: Collection[str], *, origin: str) -> dict[str, Any]:
    """The `config` without the `ignored` keys, of which one inside of the rope is named `rope_parameters.alpha`.

    Raises:
        UserError: one is absent, or its effect is known.
    """
    left = dict(config)
    for name in dict.fromkeys(ignored):
        outer, _, inner = name.partition(".") if name not in left else (name, "", "")
        holder = left.get(outer) if inner else left
        key = inner or outer
        if not isinstance(holder, Mapping) or key not in holder:
            raise UserError(
                f"--ignore-key {name}: {origin} has no such key: leave it out, or correct the name"
            )
        if key in (ROPE_KEYS if inner else _TRANSLATED | REQUIRED.keys()):
            raise UserError(
                f"--ignore-key {name}: {key} changes what the model computes and cannot be ignored: leave it out"
            )
        if inner:
            left[outer] = {other: value for other, value in holder.items() if other != inner}
        else:
            del left[outer]
    return left
