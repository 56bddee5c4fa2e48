"""Rotary frequencies (Su et al. 2021, arXiv:2104.09864) and their changes for long contexts."""

from __future__ import annotations

import math
from typing import Any

import torch

from megallama.config.schema import ModelConfig, RopeScaling
from megallama.model.packing import Packing

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


class RotaryAngles(torch.nn.Module):
    """Angles of this rank's positions, with the two methods by which megatron-core's model asks for them.

    Its own module knows only a length, from which it cuts each context-parallel rank's part; here positions come
    with the micro-batch, as they may restart in every document.
    """

    def __init__(self, inv_freq: torch.Tensor) -> None:
        super().__init__()
        self.inv_freq = inv_freq

    def get_rotary_seq_len(
        self,
        inference_context: None,
        transformer: Any,
        transformer_input: torch.Tensor | None,
        transformer_config: Any,
        packing: Packing | None = None,
    ) -> torch.Tensor:
        """Positions [B or 1, L]; what megatron-core takes for a length it only hands back to `forward`."""
        if packing is not None and packing.positions_BS is not None:
            return packing.positions_BS
        assert transformer_config.context_parallel_size == 1, "positions must come with the micro-batch"
        x_SBH = transformer_input if transformer.input_tensor is None else transformer.input_tensor
        assert x_SBH is not None
        tp = transformer_config.tensor_model_parallel_size if transformer_config.sequence_parallel else 1
        return torch.arange(x_SBH.size(0) * tp, device=x_SBH.device).unsqueeze(0)

    def forward(self, positions_BL: torch.Tensor, **_: Any) -> torch.Tensor:
        """Angles [L, B or 1, 1, D], each frequency in both halves of the channels."""
        self.inv_freq = self.inv_freq.to(positions_BL.device)
        angle_LBd = positions_BL.t().unsqueeze(-1).to(self.inv_freq.dtype) * self.inv_freq
        return torch.cat([angle_LBd, angle_LBd], dim=-1).unsqueeze(2)
