"""Rotary frequencies (Su et al. 2021, arXiv:2104.09864) and their changes for long contexts."""

from __future__ import annotations

import math

import torch

from megallama.config.schema import ModelConfig, RopeScaling

LLAMA3_LOW_FREQ_FACTOR = 1.0
LLAMA3_HIGH_FREQ_FACTOR = 4.0
"""The two factors that every published LLaMA 3.1 and 3.2 configuration uses."""


def inverse_frequencies(model: ModelConfig, *, head_dim: int) -> torch.Tensor:
    """Angle per position of each pair of channels, fp32 [head_dim / 2].

    `linear` divides every frequency by the factor (Chen et al. 2023, arXiv:2306.15595). `llama3` divides only
    wavelengths longer than the original context, keeps those shorter than a quarter of it, and interpolates
    between (The Llama 3 Herd of Models, arXiv:2407.21783, and Meta's published reference).
    """
    frequency = 1.0 / model.rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if model.rope_scaling == RopeScaling.linear:
        return frequency / model.rope_scaling_factor
    if model.rope_scaling == RopeScaling.llama3:
        wavelength = 2 * math.pi / frequency
        turns = model.rope_original_max_seq_len / wavelength
        share = (turns - LLAMA3_LOW_FREQ_FACTOR) / (LLAMA3_HIGH_FREQ_FACTOR - LLAMA3_LOW_FREQ_FACTOR)
        keep = share.clamp(0.0, 1.0)
        return keep * frequency + (1 - keep) * frequency / model.rope_scaling_factor
    return frequency
