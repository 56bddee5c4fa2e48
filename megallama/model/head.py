"""Logits of the whole vocabulary, from the parts that tensor-parallel ranks compute."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region


def whole_logits(part: torch.Tensor, *, tp_group: dist.ProcessGroup) -> torch.Tensor:
    """Logits [B, S, V] on every rank, from each rank's columns [B, S, V / tp].

    The backward takes this rank's columns of the gradient: all ranks must compute the same from the whole.
    """
    whole: torch.Tensor = gather_from_tensor_model_parallel_region(part, tp_group)
    return whole
