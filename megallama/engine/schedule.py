"""Runs megatron-core's forward-backward schedules: 1F1B or interleaved for several stages, plain for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megallama.engine.loss import LogitsLoss, Loss, token_losses
from megallama.engine.step import StepBatch, on_device
from megallama.grid import micro_batch_group_size
from megallama.model.build import Stage
from megallama.model.packing import DocumentPacking
from megallama.topology.groups import Topology

Forward = Callable[..., torch.Tensor]


class ScheduledChunk(torch.nn.Module):
    """What the schedule sees of a chunk: its forward goes through the ZeRO engine, all else to the chunk."""

    def __init__(self, stage: Stage, index: int, forward: Forward) -> None:
        super().__init__()
        chunk = stage.chunks[index]
        self.config = stage.transformer
        self.vp_stage = chunk.vp_stage
        self.model_type = chunk.model_type
        self.is_last = chunk.post_process
        """Whether its output is losses, or logits where it is given no labels."""
        self._index = index
        # Not as a submodule: the engine owns the parameters. megatron-core looks for `.module`.
        self.__dict__["module"] = chunk
        self.__dict__["_forward"] = forward

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward through the engine."""
        output: torch.Tensor = self.__dict__["_forward"](self._index, *args, **kwargs)
        return output

    def set_input_tensor(self, tensor: Any) -> None:
        """Take the previous stage's output."""
        self.__dict__["module"].set_input_tensor(tensor)


def run_schedule(
    chunks: Sequence[ScheduledChunk],
    batches: Sequence[StepBatch],
    *,
    topology: Topology,
    micro_batch_size: int,
    seq_len: int,
    loss_factor: float,
    forward_only: bool,
    loss: Loss | None = None,
) -> torch.Tensor:
    """Forward and, unless `forward_only`, backward of all micro-batches.

    Args:
        chunks: This rank's chunks; several run the interleaved schedule.
        batches: Micro-batches of this data-parallel rank.
        topology: Place of this rank.
        micro_batch_size: Sequences of a micro-batch.
        seq_len: Tokens of a sequence.
        loss_factor: The backward starts from (sum of token losses) x this.
        forward_only: Evaluate.
        loss: What is minimised; None: the cross-entropy of the labels.

    Returns:
        fp64 scalar: sum of the unmasked token losses of this rank's micro-batches; 0 before the last stage.
    """

    def forward_step(data: Iterator[StepBatch], model: ScheduledChunk) -> tuple[torch.Tensor, Any]:
        batch = on_device(next(data), topology.device)
        packing = DocumentPacking(document_starts=batch.document_starts, positions_BS=batch.positions_BS)
        if not batch.tokens_BS.numel():
            return model(None, None, None, packed_seq_params=packing), None
        labels = dict(labels=batch.labels_BS) if model.is_last and not isinstance(loss, LogitsLoss) else {}
        output = model(batch.tokens_BS, None, None, packed_seq_params=packing, **labels)

        def masked_sum(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            mask_BS = batch.loss_mask_BS
            loss_sum = (token_losses(loss, output, batch, topology=topology) * mask_BS).sum()
            # megatron-core may scale what it is given in place: report a copy.
            return loss_sum * loss_factor, mask_BS.sum().int(), loss_sum.detach().double()

        return output, masked_sum

    is_interleaved = len(chunks) > 1
    if is_interleaved:
        group_size = micro_batch_group_size(len(batches), pp=topology.grid.pp)
        chunks[0].config.microbatch_group_size_per_vp_stage = group_size
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        # Every chunk reads the same micro-batches.
        data_iterator=[iter(batches) for _ in chunks] if is_interleaved else iter(batches),
        model=list(chunks) if is_interleaved else chunks[0],
        num_microbatches=len(batches),
        seq_length=seq_len,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    total = torch.zeros((), dtype=torch.float64, device=topology.device)
    for report in reports:
        total += report
    return total
