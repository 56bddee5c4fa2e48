"""Number formats by the names that torch, NumPy and checkpoints share, as torch's. `Dtype` gives the name."""

from __future__ import annotations

import torch

FLOATS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Formats that weights, activations and checkpoints may have."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name of `dtype`, such as float32 or int64."""
    return str(dtype).removeprefix("torch.")
