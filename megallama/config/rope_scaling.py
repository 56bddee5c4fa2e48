"""Kinds of rotary scaling: which settings of the model each of them reads, and what a null means."""

from __future__ import annotations

import math

from megallama.config.schema import ModelConfig, RopeScaling

SETTINGS: dict[RopeScaling, tuple[str, ...]] = {
    RopeScaling.none: (),
    RopeScaling.linear: ("rope_scaling_factor",),
    RopeScaling.llama3: (
        *("rope_scaling_factor", "rope_original_max_seq_len"),
        *("rope_low_freq_factor", "rope_high_freq_factor"),
    ),
    RopeScaling.yarn: (
        *("rope_scaling_factor", "rope_original_max_seq_len"),
        *("rope_beta_fast", "rope_beta_slow", "rope_attention_factor"),
    ),
    RopeScaling.dynamic: ("rope_scaling_factor", "rope_original_max_seq_len"),
}
"""Settings of the model that each kind reads, beside `rope_theta`."""

RAMPS = {
    RopeScaling.llama3: ("rope_low_freq_factor", "rope_high_freq_factor"),
    RopeScaling.yarn: ("rope_beta_slow", "rope_beta_fast"),
}
"""Kinds that interpolate between frequencies, with the settings that are the ends of the ramp, the lower first."""


def only_reader_of() -> dict[str, RopeScaling]:
    """Settings that one kind alone reads, with that kind."""
    readers: dict[str, list[RopeScaling]] = {}
    for kind, names in SETTINGS.items():
        for name in names:
            readers.setdefault(name, []).append(kind)
    return {name: kinds[0] for name, kinds in readers.items() if len(kinds) == 1}


def unread_settings(*kinds: RopeScaling) -> set[str]:
    """Settings that some kind reads, but none of `kinds`."""
    known = {name for names in SETTINGS.values() for name in names}
    return known - {name for kind in kinds for name in SETTINGS[kind]}


def yarn_attention_factor(scaling_factor: float) -> float:
    """What `rope_attention_factor=null` means under YaRN: equation 22 of arXiv:2309.00071."""
    return 0.1 * math.log(scaling_factor) + 1.0


def dynamic_theta(model: ModelConfig, *, seq_len: int) -> float:
    """The base of a rope with `dynamic` scaling for sequences of `seq_len` tokens."""
    width, factor, original = model.head_width, model.rope_scaling_factor, model.rope_original_max_seq_len
    stretch = factor * max(seq_len, original) / original - (factor - 1)
    return model.rope_theta * stretch ** (width / (width - 2))
