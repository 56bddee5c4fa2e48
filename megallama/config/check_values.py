"""Rules about single settings and about settings of one section: ranges, finite numbers, schedules, model shape."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from megallama.config import rope_scaling
from megallama.config.schema import ModelConfig, RopeScaling, RunConfig, Schedule

AT_LEAST_ONE = (
    "model.num_layers",
    "model.hidden_size",
    "model.ffn_hidden_size",
    "model.num_heads",
    "model.num_kv_heads",
    "model.head_dim",
    "model.vocab_size",
    "model.vocab_multiple",
    "model.max_seq_len",
    "model.rope_original_max_seq_len",
    "parallel.tp",
    "parallel.pp",
    "parallel.cp",
    "parallel.vp",
    "precision.loss_scale_window",
    "train.steps",
    "train.seq_len",
    "train.micro_batch_size",
    "train.recompute_layers",
    "train.global_batch_size",
    "eval.batches",
    "log.interval",
)
"""Sizes. The rules that divide by them are left out while one of them is not positive."""

NOT_NEGATIVE = (
    "train.seed",
    "optim.warmup_steps",
    "optim.decay_steps",
    "optim.weight_decay",
    "optim.clip",
    "optim.partial_steps",
    "checkpoint.interval",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "eval.interval",
)

ABOVE_ZERO = (
    "model.rope_theta",
    "model.rope_low_freq_factor",
    "model.rope_high_freq_factor",
    "model.rope_beta_fast",
    "model.rope_beta_slow",
    "model.rope_attention_factor",
    "model.norm_eps",
    "model.init_std",
    "optim.lr",
    "optim.eps",
    "log.peak_tflops",
)

LARGEST = 2**63 - 1


def setting(config: RunConfig, key: str) -> Any:
    """The value of a dotted key."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def check_sizes_are_positive(config: RunConfig) -> Iterator[str]:
    """Every size is at least 1."""
    for key in AT_LEAST_ONE:
        value = setting(config, key)
        if value is not None and value < 1:
            yield f"{key} ({value}) must be at least 1: give a positive integer"


def check_integers_fit(config: RunConfig) -> Iterator[str]:
    """Every whole number is one that tensors and files can count with."""
    for key, value in _numbers(config, ""):
        if isinstance(value, int) and abs(value) > LARGEST:
            yield f"{key} ({value}) must fit into 64 bits: give a smaller number"


def check_ranges(config: RunConfig) -> Iterator[str]:
    """Numbers whose sign is fixed."""
    for key in NOT_NEGATIVE:
        if setting(config, key) < 0:
            yield f"{key} ({setting(config, key)}) must not be negative: give 0 or more"
    for key in ABOVE_ZERO:
        value = setting(config, key)
        if value is not None and value <= 0:
            yield f"{key} ({value}) must be above 0: give a positive number"


def check_numbers_are_finite(config: RunConfig) -> Iterator[str]:
    """No float is NaN or infinite."""
    for key, value in _numbers(config, ""):
        if not isinstance(value, int) and not math.isfinite(value):
            yield f"{key} ({value}) must be a finite number: give one, or leave the setting out"


def _numbers(value: Any, key: str) -> Iterator[tuple[str, int | float]]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{key}.{index}")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _numbers(getattr(value, field.name), f"{key}.{field.name}" if key else field.name)


def check_keep_every(config: RunConfig) -> Iterator[str]:
    """Only steps that are saved can be kept."""
    interval, every = config.checkpoint.interval, config.checkpoint.keep_every
    if every > 0 and interval >= 0 and (interval == 0 or every % interval):
        change = f"use {-(-every // interval) * interval}" if interval else "set checkpoint.interval too"
        yield f"checkpoint.keep_every ({every}) must be a multiple of checkpoint.interval ({interval}): {change}"


def check_ratios(config: RunConfig) -> Iterator[str]:
    """Shares and probabilities."""
    optim = config.optim
    if not 0 <= optim.min_lr_ratio <= 1:
        yield f"optim.min_lr_ratio ({optim.min_lr_ratio}) must be in [0, 1]: it is a fraction of optim.lr"
    for name, beta in (("beta1", optim.beta1), ("beta2", optim.beta2)):
        if not 0 <= beta < 1:
            yield f"optim.{name} ({beta}) must be in [0, 1): usual are 0.9 for beta1 and 0.95 for beta2"
    if not 0 <= config.model.hidden_dropout < 1:
        yield f"model.hidden_dropout ({config.model.hidden_dropout}) must be in [0, 1): 0 switches it off"


def check_loss_scale(config: RunConfig) -> Iterator[str]:
    """Only a power of two leaves the mantissas of the gradients alone."""
    scale = config.precision.initial_loss_scale
    if math.isfinite(scale) and (scale < 1 or math.frexp(scale)[0] != 0.5):
        yield f"precision.initial_loss_scale ({scale:g}) must be a power of two of at least 1: use 65536"


def check_schedule(config: RunConfig) -> Iterator[str]:
    """Warm-up and decay fit into the run."""
    optim, steps = config.optim, config.train.steps
    if steps < 1:
        return
    if optim.warmup_steps >= steps:
        yield (
            f"optim.warmup_steps ({optim.warmup_steps}) must be below train.steps ({steps}):"
            " shorten the warm-up or train longer"
        )
    if optim.schedule is not Schedule.wsd:
        return
    if optim.decay_steps == 0:
        yield (
            f"optim.decay_steps ({optim.decay_steps}) must be at least 1 with optim.schedule=wsd:"
            f" a tenth of train.steps ({max(1, steps // 10)}) is usual"
        )
    elif optim.warmup_steps < steps < optim.warmup_steps + optim.decay_steps:
        yield (
            f"optim.warmup_steps + optim.decay_steps ({optim.warmup_steps} + {optim.decay_steps}) must not"
            f" exceed train.steps ({steps}): shorten one of them or train longer"
        )


def check_heads(config: RunConfig) -> Iterator[str]:
    """Heads share key/value heads evenly, and a head's channels rotate in pairs."""
    model = config.model
    if model.num_kv_heads is not None and model.num_heads % model.num_kv_heads:
        yield (
            f"model.num_heads ({model.num_heads}) must be a multiple of model.num_kv_heads"
            f" ({model.num_kv_heads}): change one of them"
        )
    if model.head_dim is None and model.hidden_size % model.num_heads:
        yield (
            f"model.hidden_size ({model.hidden_size}) must be a multiple of model.num_heads"
            f" ({model.num_heads}) while model.head_dim is null: change one of them or set model.head_dim"
        )
    elif model.head_width % 2:
        source = "" if model.head_dim else " = model.hidden_size / model.num_heads"
        yield f"model.head_dim ({model.head_width}{source}) must be even: rotary embedding rotates channels in pairs"
    elif model.rope_scaling is RopeScaling.dynamic and model.head_width == 2:
        yield "model.head_dim (2) must be above 2 with model.rope_scaling=dynamic: give the heads more channels"


def check_rope(config: RunConfig) -> Iterator[str]:
    """Kind, factor and parameters of the rotary scaling belong together."""
    model = config.model
    yield from _rope_parameters(model)
    factor = model.rope_scaling_factor
    if not math.isfinite(factor):
        return
    if model.rope_scaling is RopeScaling.none:
        if factor != 1:
            yield (
                f"model.rope_scaling_factor ({factor:g}) has no effect with model.rope_scaling=none:"
                " set model.rope_scaling to linear, llama3, yarn or dynamic, or the factor to 1"
            )
        return
    if factor < 1:
        yield (
            f"model.rope_scaling_factor ({factor:g}) must be at least 1 with"
            f" model.rope_scaling={model.rope_scaling.value}: LLaMA 3.1 has 8, LLaMA 3.2 has 32"
        )
    has_original = "rope_original_max_seq_len" in rope_scaling.SETTINGS[model.rope_scaling]
    if has_original and model.rope_original_max_seq_len > model.max_seq_len:
        yield (
            f"model.rope_original_max_seq_len ({model.rope_original_max_seq_len}) must not exceed"
            f" model.max_seq_len ({model.max_seq_len}) with model.rope_scaling={model.rope_scaling.value}:"
            " it is the shorter context that the unscaled frequencies were trained for"
        )


def _rope_parameters(model: ModelConfig) -> Iterator[str]:
    kind = model.rope_scaling
    if kind is RopeScaling.yarn and 0 < model.rope_theta <= 1:
        yield f"model.rope_theta ({model.rope_theta:g}) must be above 1 with model.rope_scaling=yarn: 10000 is usual"
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    for name, reader in rope_scaling.only_reader_of().items():
        value = getattr(model, name)
        if kind is not reader and value != defaults[name] and value > 0:
            yield (
                f"model.{name} ({value:g}) has no effect with model.rope_scaling={kind.value}:"
                f" leave it out, or set model.rope_scaling={reader.value}"
            )
    for low, high in rope_scaling.RAMPS.values():
        if getattr(model, low) >= getattr(model, high) > 0:
            yield (
                f"model.{low} ({getattr(model, low):g}) must be below model.{high} ({getattr(model, high):g}):"
                " they are the two limits between which frequencies are interpolated; the usual values are"
                f" {defaults[low]:g} and {defaults[high]:g}"
            )


def check_seq_len(config: RunConfig) -> Iterator[str]:
    """The model is meant for sequences of this length."""
    if config.train.seq_len > config.model.max_seq_len:
        yield (
            f"train.seq_len ({config.train.seq_len}) must not exceed model.max_seq_len"
            f" ({config.model.max_seq_len}): shorten the sequences or choose a model for longer ones"
        )


def check_partial(config: RunConfig) -> Iterator[str]:
    """The first steps train something, if not everything."""
    optim, vocab_size = config.optim, config.model.vocab_size
    rows = optim.partial_rows_from
    if rows is not None and not 0 <= rows < vocab_size:
        yield (
            f"optim.partial_rows_from ({rows}) must be a token id of the model (0 to {vocab_size - 1}):"
            " give the size of the old vocabulary"
        )
    is_chosen = rows is not None or bool(optim.partial_parameters)
    if optim.partial_steps > 0 and not is_chosen:
        yield (
            f"optim.partial_steps ({optim.partial_steps}) would train no parameter: set optim.partial_rows_from"
            " or optim.partial_parameters"
        )
    if is_chosen and not optim.partial_steps:
        yield (
            "optim.partial_rows_from and optim.partial_parameters have no effect with optim.partial_steps (0):"
            " set optim.partial_steps, or leave them out"
        )


def check_partial_names(patterns: Iterable[str], names: Iterable[str]) -> Iterator[str]:
    """Each of `optim.partial_parameters` fits a parameter of the model, whose canonical names are `names`."""
    known = list(names)
    unknown = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in known)]
    if unknown:
        example = sorted(known)[len(known) // 2]
        yield (
            f"optim.partial_parameters ({', '.join(unknown)}) matches no parameter of the model: use names such as"
            f" {example}, with * for any part of one"
        )
