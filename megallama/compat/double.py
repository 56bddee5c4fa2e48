"""Stand-ins with which DeepSpeed and megatron-core compute in fp64, where a bug can be told from rounding.

Both name fp32 where they mean "the wide format": DeepSpeed 0.19.8 in its master weights, accumulation, reduction
and norms; megatron-core 0.16 in the cross-entropy (`logits.float()`). With `precision.dtype=fp64` the modules
below see a torch whose float32 is float64, and `Tensor.float()` leaves fp64 tensors alone. This can go when
both take the wide format from the parameters.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from megallama.compat.megatron_core import _View

MODULES = {
    "deepspeed.runtime.engine": "data types of model, accumulation and reduction",
    "deepspeed.runtime.base_optimizer": "format of the master weights",
    "deepspeed.runtime.utils": "norms",
    "deepspeed.runtime.zero.stage_1_and_2": "master weights, norms",
    "deepspeed.runtime.zero.stage3": "master weights, norms",
    "deepspeed.runtime.zero.partition_parameters": "formats that it partitions",
}
"""Modules that get the view, with what they need it for."""

_narrowing_float = torch.Tensor.float


def _keep_double(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else _narrowing_float(tensor, *args, **kwargs)


def use_double(is_on: bool) -> None:
    """Let fp64 stay fp64 in this process, or undo it. May be called again."""
    view = _View(torch, float32=torch.float64, float=torch.float64, FloatTensor=torch.DoubleTensor)
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
    for name in (*MODULES, type(accelerator).__module__):  # the last one makes the buffers of norms
        module: Any = importlib.import_module(name)
        module.torch = view if is_on else torch
    torch.Tensor.float = _keep_double if is_on else _narrowing_float  # type: ignore[method-assign, assignment]
