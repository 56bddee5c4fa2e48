"""The engine: the interface between the loop and all parallelism (`train_step`, `eval_step`, state for checkpoints)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist

from megallama.config.schema import (
    Dtype,
    KernelConfig,
    OptimConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
    ZeroConfig,
)
from megallama.engine.adam import OptimizerFactory, build_adam, build_own, parameter_groups
from megallama.engine.fragment import Fragment
from megallama.engine.invariants import Invariants
from megallama.engine.learning_rate import learning_rate
from megallama.engine.loss import Loss
from megallama.engine.partial_training import PartialTraining
from megallama.engine.schedule import ScheduledChunk, run_schedule
from megallama.engine.state import (
    check_fragments,
    load_counters,
    own_fragments,
    prepare_state,
    publish_masters,
)
from megallama.engine.state import counters as state_counters
from megallama.engine.step import EvalResult, StepBatch, StepResult
from megallama.engine.tie import EmbeddingTie
from megallama.engine.zero import ZeroEngine
from megallama.grid import num_micro_batches
from megallama.host.errors import UserError
from megallama.model.build import Stage, build_model
from megallama.model.layout import Piece
from megallama.topology.groups import Topology
from megallama.topology.rng import seed_streams

ScheduleFunction = Callable[[int, int], float]
"""(number of the step from 0, steps of the whole run) -> learning rate; a pure function, so that a run can resume."""


class Engine:
    """One pipeline stage under ZeRO, driven step by step. `build_engine` describes the arguments."""

    def __init__(
        self,
        stage: Stage,
        *,
        topology: Topology,
        train: TrainConfig,
        zero: ZeroEngine,
        loss: Loss | None,
        schedule: ScheduleFunction,
        partial_training: PartialTraining,
    ) -> None:
        self._train = train
        self._topology = topology
        self._stage = stage
        self._zero = zero
        self._loss = loss
        self._schedule = schedule
        self._partial = partial_training
        self._scheduled = [ScheduledChunk(stage, i, self._zero) for i in range(len(stage.chunks))]
        self._tie = EmbeddingTie(stage, self._zero, topology=topology) if stage.model.tie_embeddings else None
        check_fragments(self._zero, stage.module)
        self._invariants = Invariants(stage, self._zero, topology=topology)

    def train_step(self, step: int, batches: Sequence[StepBatch]) -> StepResult:
        """Optimizer step number `step` (from 0) over this rank's micro-batches."""
        topology = self._topology
        if self._train.check_invariants:
            self.check_invariants(step)
        seed_streams(topology, seed=self._train.seed, step=step)
        is_partial = self._partial.begin(step)
        num_tokens = self._count_tokens(batches)
        loss_scale = self._zero.loss_scale
        self._zero.train(True)
        loss_sum = run_schedule(
            self._scheduled,
            batches,
            topology=topology,
            micro_batch_size=self._train.micro_batch_size,
            seq_len=self._train.seq_len,
            loss_factor=self._zero.shard_size / max(1, num_tokens),
            forward_only=False,
            loss=self._loss,
        )
        if self._tie is not None:
            self._tie.collect_gradient()
        lr = self._learning_rate(step)
        grad_norm, is_skipped = self._zero.step(lr, is_decayed=not is_partial)
        if self._tie is not None:
            self._tie.publish_weight()
        total, tokens = self._sum_over_job(loss_sum, num_tokens)
        return StepResult(
            loss=total / max(1, tokens),
            grad_norm=grad_norm,
            lr=lr,
            num_tokens=tokens,
            loss_scale=loss_scale,
            is_skipped=is_skipped,
        )

    def check_invariants(self, step: int) -> None:
        """Raise InvariantError on every rank where copies differ or gradients are left over; a collective call."""
        self._invariants.check(step)

    @torch.no_grad()
    def eval_step(self, batches: Sequence[StepBatch]) -> EvalResult:
        """Cross-entropy of one global batch, whatever loss is trained on; changes nothing."""
        self._zero.train(False)
        loss_sum = run_schedule(
            self._scheduled,
            batches,
            topology=self._topology,
            micro_batch_size=self._train.micro_batch_size,
            seq_len=self._train.seq_len,
            loss_factor=1.0,
            forward_only=True,
        )
        total, tokens = self._sum_over_job(loss_sum, self._count_tokens(batches))
        return EvalResult(loss_sum=total, num_tokens=tokens)

    @property
    def layout(self) -> dict[str, tuple[Piece, ...]]:
        """Canonical pieces of every local parameter, by name."""
        return dict(self._stage.layout)

    def fragments(self) -> Iterator[Fragment]:
        """Master weights and moments that this rank owns, as views; create them first if no step was taken yet."""
        prepare_state(self._zero)
        return own_fragments(self._zero, self._stage.module)

    def counters(self) -> dict[str, float | int]:
        """Numbers beside the tensors that a resume needs (optimizer steps, loss scale)."""
        return state_counters(self._zero)

    def restore(self, counters: dict[str, float | int]) -> None:
        """Call after the fragments were filled: sets the counters and rounds the masters into the weights."""
        load_counters(self._zero, counters)
        publish_masters(self._zero)
        if self._tie is not None:
            self._tie.publish_weight()
        check_fragments(self._zero, self._stage.module)

    def _learning_rate(self, step: int) -> float:
        lr = float(self._schedule(step, self._train.steps))
        if not (math.isfinite(lr) and lr >= 0):
            raise UserError(
                f"schedule gave a learning rate of {lr} at step {step}: return a finite one, 0 or more"
            )
        return lr

    def _count_tokens(self, batches: Sequence[StepBatch]) -> int:
        """Unmasked tokens of the global batch; 0 on stages that read none."""
        count = sum(int(batch.loss_mask_BS.sum()) for batch in batches)
        tensor = torch.tensor(count, dtype=torch.int64, device=self._topology.device)
        # Ranks of a cp group hold parts of the same sequences.
        dist.all_reduce(tensor, group=self._topology.dp_cp_group)
        return int(tensor)

    def _sum_over_job(self, loss_sum: torch.Tensor, num_tokens: int) -> tuple[float, int]:
        """Job-wide loss sum and token count, on every rank."""
        topology = self._topology
        dist.all_reduce(loss_sum, group=topology.dp_cp_group)
        tokens = float(num_tokens) if topology.is_last_stage else 0.0
        pair = torch.stack([loss_sum, loss_sum.new_tensor(tokens)])
        dist.all_reduce(pair, group=topology.pp_group)
        total, tokens = pair.tolist()
        return total, int(tokens)


def build_engine(
    stage: Stage,
    *,
    topology: Topology,
    zero: ZeroConfig,
    precision: PrecisionConfig,
    optim: OptimConfig,
    train: TrainConfig,
    kernels: KernelConfig,
    loss: Loss | None = None,
    optimizer: OptimizerFactory | None = None,
    schedule: ScheduleFunction | None = None,
) -> Engine:
    """The engine of this rank; a collective call.

    Args:
        stage: This rank's part of the model.
        topology: Place of this rank.
        zero: What is sharded over data-parallel ranks.
        precision: Number format; what `stage` was built with.
        optim: AdamW, clipping, partial training, learning rate.
        train: Sizes of a step, and the number of steps.
        kernels: Which AdamW.
        loss: What is minimised; None: the cross-entropy of the labels.
        optimizer: Makes the optimizer from parameter groups and `optim`; None: AdamW.
        schedule: Learning rate of a step; None: as `optim` says.

    Raises:
        UserError: an optimizer whose state checkpoints cannot hold, or a kernel that cannot run here.
    """
    groups = parameter_groups(stage.module.named_parameters(), weight_decay=optim.weight_decay)
    if optimizer is None:
        adam = build_adam(groups, optim, kernel=kernels.adam.value)
    else:
        adam = build_own(optimizer, groups, optim)
    sharded = ZeroEngine(
        stage.module,
        adam,
        topology=topology,
        zero=zero,
        precision=precision,
        clip=optim.clip,
        hidden_size=stage.model.hidden_size,
        micro_batch_size=train.micro_batch_size,
        num_micro_batches=num_micro_batches(
            train.global_batch_size, micro_batch_size=train.micro_batch_size, dp=topology.grid.dp
        ),
    )
    if precision.dtype == Dtype.fp16:
        stage.transformer.grad_scale_func = sharded.scale
    return Engine(
        stage,
        topology=topology,
        train=train,
        zero=sharded,
        loss=loss,
        schedule=schedule or partial(_configured_lr, optim),
        partial_training=PartialTraining(optim, stage, sharded),
    )


def _configured_lr(optim: OptimConfig, step: int, total_steps: int) -> float:
    return learning_rate(optim, step=step, total_steps=total_steps)


def build_run_engine(
    config: RunConfig,
    topology: Topology,
    *,
    loss: Loss | None = None,
    optimizer: OptimizerFactory | None = None,
    schedule: ScheduleFunction | None = None,
) -> Engine:
    """Model and engine of a whole run on this rank; `build_model` and `build_engine` describe the rest."""
    stage = build_model(
        config.model,
        topology=topology,
        parallel=config.parallel,
        precision=config.precision,
        train=config.train,
        kernels=config.kernels,
    )
    return build_engine(
        stage,
        topology=topology,
        zero=config.zero,
        precision=config.precision,
        optim=config.optim,
        train=config.train,
        kernels=config.kernels,
        loss=loss,
        optimizer=optimizer,
        schedule=schedule,
    )
