"""The part of a parameter's optimizer state that one rank owns."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Fragment:
    """A flat range of a local parameter with the state tensors of that range, as views of ZeRO's buffers."""

    param_name: str
    """Local parameter name in the stage module."""
    start: int
    """First element in the flattened local parameter."""
    numel: int
    """Number of elements."""
    views: dict[str, torch.Tensor]
    """`fp32`, `exp_avg`, `exp_avg_sq`: 1-D views of `numel` elements; writing to them writes the state."""
    is_written: bool
    """Whether this rank writes it (False on data-parallel replicas under ZeRO 0)."""
