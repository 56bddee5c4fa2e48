"""What of torch is private or replaced. Read in torch 2.13.0; `tests/compat/test_torch.py` says what can go."""

from __future__ import annotations

from typing import Any

import torch

VERSION = "2.13.0"

aten: Any = torch.ops.aten

# Attention with its log-sum-exp, by which results over parts of the keys are merged. The public function,
# `torch.nn.functional.scaled_dot_product_attention`, returns the output alone.
cpu_flash_forward = aten._scaled_dot_product_flash_attention_for_cpu
cpu_flash_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
cuda_flash_forward = aten._flash_attention_forward
cuda_flash_backward = aten._flash_attention_backward
cuda_efficient_forward = aten._scaled_dot_product_efficient_attention
cuda_efficient_backward = aten._scaled_dot_product_efficient_attention_backward

_narrowing_float = torch.Tensor.float


def _keep_double(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else _narrowing_float(tensor, *args, **kwargs)


def keep_double(is_on: bool) -> None:
    """Let `Tensor.float()` leave fp64 tensors alone in this process, or undo it. May be called again.

    megatron-core 0.16.1 computes the cross-entropy of `logits.float()`, where it means "fp32 at least".
    """
    torch.Tensor.float = _keep_double if is_on else _narrowing_float  # type: ignore[method-assign, assignment]
