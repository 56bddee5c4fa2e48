"""The input and the result of a step: `StepBatch`, `StepResult`, `EvalResult`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch


class StepBatch(Protocol):
    """What the engine needs of a micro-batch. `batches.micro_batch.MicroBatch` is the framework's own.

    B micro-batch, S sequence, or this context-parallel rank's part of it.
    Stages that read no tokens have empty ones, [B, 0]. It is a dataclass, and may have further fields for a loss of
    one's own: tensors among them come to the device with the others.
    """

    @property
    def tokens_BS(self) -> torch.Tensor:
        """Input token ids, int64."""

    @property
    def labels_BS(self) -> torch.Tensor:
        """Token ids to predict, int64."""

    @property
    def loss_mask_BS(self) -> torch.Tensor:
        """1 where the loss counts, fp32."""

    @property
    def positions_BS(self) -> torch.Tensor:
        """Position of each token for the rotary embedding, int64 [B, S], or [1, S] for all rows."""

    @property
    def document_starts(self) -> tuple[tuple[int, ...], ...]:
        """Where documents start in each whole sequence."""


Batch = TypeVar("Batch", bound=StepBatch)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """`batch` with all its tensors on `device`."""
    if device.type == "cpu":
        return batch
    whole: Any = batch
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(whole)}
    moved = {
        name: value.to(device, non_blocking=True) for name, value in values.items() if torch.is_tensor(value)
    }
    result: Batch = dataclasses.replace(whole, **moved)
    return result


MIN_LOSS_SCALE = 1
"""The fp16 loss scale goes no lower: a gradient that overflows there is one of the model, not of the scale."""


@dataclass(frozen=True)
class StepResult:
    """Numbers of one optimizer step, equal on every rank."""

    loss: float
    """Mean over all unmasked tokens of the global batch."""
    grad_norm: float
    """Global L2 norm before clipping; infinite where the step was skipped."""
    lr: float
    """Learning rate that was used."""
    num_tokens: int
    """Unmasked tokens of the global batch."""
    loss_scale: float
    """fp16 loss scale during the step; 1 in other precisions."""
    is_skipped: bool
    """Whether fp16 overflow kept the weights as they were."""


@dataclass(frozen=True)
class EvalResult:
    """Sums over evaluated batches, equal on every rank."""

    loss_sum: float
    """Sum of token losses."""
    num_tokens: int
    """Unmasked tokens."""
