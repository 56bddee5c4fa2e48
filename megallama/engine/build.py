"""The engine: the interface between the loop and all parallelism (`train_step`, `eval_step`, state for checkpoints)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from megallama.config.schema import Dtype, RunConfig
from megallama.engine.adam import build_adam, parameter_groups
from megallama.engine.fragment import Fragment
from megallama.engine.invariants import Invariants
from megallama.engine.learning_rate import learning_rate
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
from megallama.engine.step import EvalResult, MicroBatch, StepResult
from megallama.engine.tie import EmbeddingTie
from megallama.engine.zero import ZeroEngine
from megallama.model.build import Stage
from megallama.model.layout import Piece
from megallama.topology.groups import Topology
from megallama.topology.rng import seed_streams


class Engine:
    """One pipeline stage under ZeRO, driven step by step."""

    def __init__(self, config: RunConfig, *, topology: Topology, stage: Stage) -> None:
        self._config = config
        self._topology = topology
        self._stage = stage
        groups = parameter_groups(stage.module.named_parameters(), weight_decay=config.optim.weight_decay)
        adam = build_adam(groups, config.optim, kernel=config.kernels.adam.value)
        self._zero = ZeroEngine(stage.module, adam, config=config, topology=topology)
        if config.precision.dtype == Dtype.fp16:
            stage.transformer.grad_scale_func = self._zero.scale
        self._scheduled = [ScheduledChunk(stage, i, self._zero) for i in range(len(stage.chunks))]
        self._tie = (
            EmbeddingTie(stage, self._zero, topology=topology) if config.model.tie_embeddings else None
        )
        check_fragments(self._zero, stage.module)
        self._partial = PartialTraining(config.optim, stage, self._zero)
        self._invariants = Invariants(stage, self._zero, topology=topology)

    def train_step(self, step: int, batches: Sequence[MicroBatch]) -> StepResult:
        """Optimizer step number `step` (from 0) over this rank's micro-batches."""
        topology, config = self._topology, self._config
        if config.train.check_invariants:
            self.check_invariants(step)
        seed_streams(topology, seed=config.train.seed, step=step)
        is_partial = self._partial.begin(step)
        num_tokens = self._count_tokens(batches)
        loss_scale = self._zero.loss_scale
        self._zero.train(True)
        loss_sum = run_schedule(
            self._scheduled,
            batches,
            topology=topology,
            micro_batch_size=config.train.micro_batch_size,
            seq_len=config.train.seq_len,
            loss_factor=self._zero.shard_size / max(1, num_tokens),
            forward_only=False,
        )
        if self._tie is not None:
            self._tie.collect_gradient()
        lr = learning_rate(config.optim, step=step, total_steps=config.train.steps)
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
    def eval_step(self, batches: Sequence[MicroBatch]) -> EvalResult:
        """Losses of one global batch without changing anything."""
        self._zero.train(False)
        loss_sum = run_schedule(
            self._scheduled,
            batches,
            topology=self._topology,
            micro_batch_size=self._config.train.micro_batch_size,
            seq_len=self._config.train.seq_len,
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

    def _count_tokens(self, batches: Sequence[MicroBatch]) -> int:
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


def build_engine(config: RunConfig, topology: Topology, stage: Stage) -> Engine:
    """The engine of this rank."""
    return Engine(config, topology=topology, stage=stage)
