"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467): x / sqrt(mean(x^2) + eps) * weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from megallama.kernels.named import require

NormFunction = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension, statistics in fp32 at least; same shape and dtype as `x`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm on torch's fused operator."""
    return F.rms_norm(x, (x.size(-1),), weight, eps)


def rms_norm_apex(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm on NVIDIA apex's fused kernel (CUDA)."""
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    normalized: torch.Tensor = fused_rms_norm_affine(x, weight, (x.size(-1),), eps)
    return normalized


def choose_norm(name: str) -> tuple[str, NormFunction]:
    """The backend called `name`; for `auto`, torch's.

    Raises:
        UserError: `name` was asked for and cannot run here.
    """
    if name == "apex":
        require("norm", name)
    backends: dict[str, NormFunction] = {
        "torch": rms_norm_torch,
        "apex": rms_norm_apex,
        "reference": rms_norm_reference,
    }
    chosen = "torch" if name == "auto" else name
    return chosen, backends[chosen]
