"""The layer chunks of one rank as one module, and the embedding that two stages share.

With tied embeddings and several stages, the first stage owns the weight: only it stands in a module, so only it
is sharded, updated and saved. The last stage's output layer computes with a copy that is no parameter. Its
gradient enters the first stage as one more backward, which any ZeRO stage takes for that of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Chunks(torch.nn.Module):
    """Forward of chunk number `index`; under the plain schedule a rank has one chunk.

    Args:
        chunks: megatron-core models, in the order in which a micro-batch passes them.
        tied_weight: The embedding, where another stage's output layer computes with a copy of it.
    """

    def __init__(
        self, chunks: Sequence[torch.nn.Module], *, tied_weight: torch.nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.chunks = torch.nn.ModuleList(chunks)
        self.tied = TiedGradient(tied_weight) if tied_weight is not None else None

    def forward(self, index: int | None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The chunk's output; for index None a scalar whose backward adds a gradient to the tied weight."""
        module = self.tied if index is None else self.chunks[index]
        assert module is not None, "this rank has no tied weight"
        output: torch.Tensor = module(*args, **kwargs)
        return output


class TiedGradient(torch.nn.Module):
    """Owns the embedding a second time, so that ZeRO 3 gathers it round this module's forward too."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, gradient: torch.Tensor) -> torch.Tensor:
        """A zero whose derivative by the weight is `gradient`."""
        zero: torch.Tensor = _GivenGradient.apply(self.weight, gradient)
        return zero


class _GivenGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.dtype = weight.dtype
        ctx.save_for_backward(gradient)
        return gradient.new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.to(ctx.dtype), None


def take_output_weight(chunk: torch.nn.Module) -> torch.Tensor:
    """Turn the weight of a model's output layer from a parameter into a plain leaf tensor, and return it."""
    layer: Any = chunk.output_layer
    weight: torch.Tensor = layer.weight.detach()
    del layer.weight
    layer.weight = weight.requires_grad_()
    return weight
