"""Tied embeddings in a pipeline: one weight that is used on the first and on the last stage.

The first stage owns the weight (see `model/chunks.py`). Summing both gradients inside the backward would
deadlock: the last stage would wait for the first stage's backward of the same micro-batch. So the last stage
sums its own in fp32, and they move once a step.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megallama.compat.deepspeed import whole_shape
from megallama.engine.zero import ZeroEngine
from megallama.model.build import Stage
from megallama.topology.groups import Topology


class EmbeddingTie:
    """Keeps the last stage's copy equal to the first stage's weight. Does nothing on the stages between them."""

    def __init__(self, stage: Stage, zero: ZeroEngine, *, topology: Topology) -> None:
        self._zero = zero
        self._weight: torch.nn.Parameter | None = None
        self._copy: torch.Tensor | None = None
        if stage.module.tied is not None:
            self._weight = stage.module.tied.weight
        if stage.tied_copy is not None:
            # The engine has moved the parameters; this is none.
            self._copy = stage.tied_copy.detach().to(topology.device).requires_grad_()
            stage.chunks[-1].output_layer.weight = self._copy
            self._gradient = torch.zeros_like(self._copy, dtype=wide(self._copy.dtype))
            self._copy.register_post_accumulate_grad_hook(self._accumulate)
        self._group = topology.first_last_group

    def _accumulate(self, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        self._gradient.add_(weight.grad)
        weight.grad = None

    def collect_gradient(self) -> None:
        """Add the last stage's gradient to the first stage's. After the schedule, before the optimizer's step."""
        if self._copy is not None:
            dist.broadcast(self._gradient, group=self._group, group_src=1)
            self._gradient.zero_()
        elif self._weight is not None:
            shape = whole_shape(self._weight)
            gradient = torch.empty(shape, dtype=wide(self._weight.dtype), device=self._zero.device)
            dist.broadcast(gradient, group=self._group, group_src=1)
            self._zero(None, gradient).backward()

    def publish_weight(self) -> None:
        """Give the last stage the first stage's weight. After every change of the weights."""
        if self._copy is not None:
            dist.broadcast(self._copy.detach(), group=self._group, group_src=0)
        elif self._weight is not None:
            with self._zero.whole(self._weight):
                dist.broadcast(self._weight.detach(), group=self._group, group_src=0)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The format of sums: fp32, or fp64 where the parameters are."""
    return torch.promote_types(dtype, torch.float32)
