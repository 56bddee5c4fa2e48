"""Rotary frequencies (Su et al. 2021, arXiv:2104.09864) and their scaling for long contexts."""

from __future__ import annotations

import math
from typing import Any

import torch

from megallama.config.rope_scaling import dynamic_theta, yarn_attention_factor
from megallama.config.schema import ModelConfig, RopeScaling
from megallama.model.packing import DocumentPacking


def inverse_frequencies(model: ModelConfig, *, seq_len: int) -> torch.Tensor:
    """Angle per position of each pair of channels, fp32 [head width / 2].

    `linear` divides every frequency by the factor (Chen et al. 2023, arXiv:2306.15595). `llama3` divides only
    wavelengths longer than the original context, keeps those shorter than a quarter of it, and interpolates
    between (The Llama 3 Herd of Models, arXiv:2407.21783, and Meta's published reference). `yarn` does the same
    with a ramp over the channels (Peng et al. 2023, arXiv:2309.00071). `dynamic` raises the base for sequences
    longer than the original context (NTK-aware scaling, appendix of the same paper).

    Args:
        model: The shape.
        seq_len: Length of the run's sequences in tokens; only `dynamic` asks.
    """
    width = model.head_width
    theta, factor, original = model.rope_theta, model.rope_scaling_factor, model.rope_original_max_seq_len
    if model.rope_scaling == RopeScaling.dynamic:
        theta = dynamic_theta(model, seq_len=seq_len)
    frequency = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    if model.rope_scaling == RopeScaling.linear:
        return frequency / factor
    if model.rope_scaling == RopeScaling.llama3:
        turns = original * frequency / (2 * math.pi)
        low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    elif model.rope_scaling == RopeScaling.yarn:
        keep = _yarn_ramp(model)
    else:
        return frequency
    return keep * frequency + (1 - keep) * frequency / factor


def _yarn_ramp(model: ModelConfig) -> torch.Tensor:
    """How much of its frequency each pair of channels keeps: 1 for fast ones, 0 for slow ones, [head width / 2]."""
    head_dim = model.head_width

    def channel(turns: float) -> float:
        """The pair of channels that turns so often in the original context; the inverse of the frequencies."""
        length = model.rope_original_max_seq_len / (2 * math.pi * turns)
        return head_dim * math.log(length) / (2 * math.log(model.rope_theta))

    first = max(math.floor(channel(model.rope_beta_fast)), 0)
    last = min(math.ceil(channel(model.rope_beta_slow)), head_dim - 1)
    # A ramp of no width is a step.
    width = max(last - first, 0.001)
    return 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / width).clamp(0.0, 1.0)


def attention_factor(model: ModelConfig) -> float:
    """What queries and keys are scaled by: 1 unless YaRN says otherwise."""
    if model.rope_scaling != RopeScaling.yarn:
        return 1.0
    if model.rope_attention_factor is not None:
        return model.rope_attention_factor
    return yarn_attention_factor(model.rope_scaling_factor)


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
        packing: DocumentPacking | None = None,
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
