"""SwiGLU (Shazeer 2020, arXiv:2002.05202): silu(gate) * up."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, where `gate_up` [..., 2f] holds gate and up side by side; returns [..., f]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
