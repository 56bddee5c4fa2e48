"""DeepSpeed: ZeRO stages 0 to 3 under megatron-core's schedules.

Written against DeepSpeed 0.19.8. Its private functions and what is replaced in it stand in `compat/deepspeed.py`.
What is done with them, and why:

- `managed_gradient_accumulation: false` with one accumulation step: the schedule owns the micro-batches; else
  every stage would divide the gradient once more.
- Its state of backward hooks assumes forward, backward, forward, backward. Under 1F1B backwards follow each
  other and gradients would silently go missing (ZeRO 2, bf16), so that state is cleared at the start of
  each backward: just before DeepSpeed's own prologue, for what the prologue sets must last (with ZeRO 3 and
  recompute the reduction would else run after the first layer). `_check_backwards` counts that every backward
  reached its end and left no gradient behind.
- Stage 0 of DeepSpeed cannot run a backward that starts from a pipeline gradient and accumulates bf16
  gradients in bf16. Here stage 0 is its stage 1 over a group of this rank alone, with one all-reduce of the
  fp32 gradients before the step.
- ZeRO 3 compares the order of parameter fetches over all ranks of the job. Pipeline stages differ in it and in how
  often they compare, which deadlocks: here only the ranks that share parameters are compared.
- ZeRO 3 lets the first backward of a step overwrite the gradients of the last step, and the later ones add. Under
  the interleaved schedule the first backward reaches one chunk only: so the gradients are cleared after the step.
- With offload and fp32, ZeRO 2 lets the first backward of a step overwrite the sums in host memory and the later ones
  add: the same, so these are cleared after the step too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megallama.compat import deepspeed as compat
from megallama.config.schema import Dtype, PrecisionConfig, ZeroConfig
from megallama.engine.local_gradients import LocalGradients
from megallama.engine.step import MIN_LOSS_SCALE
from megallama.topology.groups import DeepSpeedGroups, Topology

REDUCE_BUCKET_ELEMENTS = 25_000_000
"""Elements of one all-reduce of stage 0."""


class ZeroEngine:
    """DeepSpeed's engine round one pipeline stage, with the calls that the schedule and the step need."""

    def __init__(
        self,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        topology: Topology,
        zero: ZeroConfig,
        precision: PrecisionConfig,
        clip: float,
        hidden_size: int,
        micro_batch_size: int,
        num_micro_batches: int,
    ) -> None:
        """Shards `module` and its `optimizer`; a collective call.

        Args:
            module: This rank's stage; it is moved to the device.
            optimizer: Over the parameters of `module`.
            topology: Place of this rank.
            zero: What is sharded.
            precision: Format of the parameters.
            clip: Largest global gradient norm; 0: any.
            hidden_size: ZeRO 3 keeps parameters that are no larger whole.
            micro_batch_size: Sequences of a micro-batch.
            num_micro_batches: Micro-batches of a step on this rank.
        """
        self.zero_stage = zero.stage
        self._is_loss_scaled = precision.dtype == Dtype.fp16
        self._topology = topology
        self.device = topology.device
        self.is_first_replica = topology.dp_cp_group.rank() == 0
        self.shard_group = topology.own_group if self.zero_stage == 0 else topology.dp_cp_group
        self.shard_size = self.shard_group.size()
        """Ranks over which DeepSpeed averages gradients; the loss is multiplied by it."""
        compat.prepare_process(
            device=self.device,
            is_double=precision.dtype == Dtype.fp64,
            check_fetch_order=self._assert_same_ints,
        )
        self._engine = compat.initialize(
            module,
            optimizer,
            settings=deepspeed_config(
                zero,
                precision=precision,
                clip=clip,
                hidden_size=hidden_size,
                micro_batch_size=micro_batch_size,
                shard_size=self.shard_size,
            ),
            mpu=DeepSpeedGroups(topology, shard_group=self.shard_group),
        )
        self._weight_decays = [group["weight_decay"] for group in self.optimizer.optimizer.param_groups]
        self._num_begun = self._num_ended = 0
        self._local = self._local_gradients(
            module, period=zero.accumulate_micro_batches, num_micro_batches=num_micro_batches
        )
        compat.watch_backwards(self._engine, at_begin=self._begin_backward, at_end=self._end_backward)

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's ZeRO optimizer."""
        return self._engine.optimizer

    @property
    def loss_scale(self) -> float:
        """Current fp16 loss scale; 1 otherwise."""
        scaler = getattr(self.optimizer, "loss_scaler", None)
        return float(scaler.cur_scale) if scaler is not None else 1.0

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward of the stage through the engine."""
        output: torch.Tensor = self._engine(*args, **kwargs)
        return output

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the fp16 loss scale."""
        scaled: torch.Tensor = self._engine.scale(loss)
        return scaled

    @contextmanager
    def whole(self, parameter: torch.nn.Parameter) -> Iterator[None]:
        """`parameter` in full for the time of the block, also where ZeRO 3 has partitioned it. Only to be read."""
        if self.zero_stage < 3:
            yield
            return
        with compat.gathered(parameter):
            yield

    def kept_gradients(self) -> Iterator[torch.Tensor]:
        """What DeepSpeed has summed beside the parameters' own gradients; nothing, or zeros, between two steps."""
        optimizer = self.optimizer
        if self.zero_stage == 3:
            yield optimizer.grad_partitions_flat_buffer
        if self._local is not None:
            yield from self._local.kept()
        yield from getattr(optimizer, "fp32_groups_gradients_flat", [])
        for group in getattr(optimizer, "averaged_gradients", {}).values():
            yield from (tensor for tensor in group or [] if tensor is not None)

    def train(self, mode: bool) -> None:
        """Switch the stage between training and evaluation."""
        self._engine.train(mode)

    def step(self, lr: float, *, is_decayed: bool = True) -> tuple[float, bool]:
        """Reduce, clip and update with learning rate `lr`, with weight decay or without.

        Returns:
            The global gradient norm before clipping, and whether the update was skipped (fp16 overflow).
        """
        self._check_backwards()
        for group, decay in zip(self.optimizer.optimizer.param_groups, self._weight_decays, strict=True):
            group["lr"] = lr
            group["weight_decay"] = decay if is_decayed else 0.0
        if self.zero_stage == 0:
            self._all_reduce_gradients()
        self._engine.step()
        if self.zero_stage == 3:
            self.optimizer.grad_partitions_flat_buffer.zero_()
        for kept in getattr(self.optimizer, "accumulated_grads_in_cpu", {}).values():
            kept.zero_()
        norm = float(self._engine.get_global_grad_norm())
        # DeepSpeed's bf16 optimizer skips a step too where a gradient is no number: nothing that a lower scale mends.
        skipped = self._is_loss_scaled and bool(getattr(self.optimizer, "overflow", False))
        return (math.inf if skipped else norm), skipped

    def _local_gradients(
        self, module: torch.nn.Module, *, period: int, num_micro_batches: int
    ) -> LocalGradients | None:
        if period == 1:
            return None
        tied: Any = getattr(module, "tied", None)
        return LocalGradients(
            self.optimizer,
            period=period,
            backwards=num_micro_batches,
            # The last stage's gradient comes in as one more backward (engine/tie.py).
            further={} if tied is None else {tied.weight: 1},
        )

    def _assert_same_ints(self, ints: list[int]) -> None:
        """Whether ZeRO 3 fetches the same parameters in the same order on the ranks that share them."""
        digest = hashlib.blake2b(repr(ints).encode(), digest_size=7).digest()
        number = int.from_bytes(digest, "little")
        both = torch.tensor([number, -number], dtype=torch.int64, device=self.device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.shard_group)
        high, low = both.tolist()
        assert high == -low, (
            f"ZeRO 3: this rank fetches parameters in another order than its replicas: {ints}"
        )

    def _begin_backward(self) -> None:
        self.optimizer.clear_backward_seen_flag()
        compat.expect_scaled_backward(self._engine)
        self._num_begun += 1

    def _end_backward(self) -> None:
        self._num_ended += 1
        if self._local is not None:
            self._local.end_backward()

    def _check_backwards(self) -> None:
        begun, ended = self._num_begun, self._num_ended
        self._num_begun = self._num_ended = 0
        assert begun == ended, (
            f"DeepSpeed finished {ended} of {begun} backwards: gradients of the others would be lost"
        )
        if self._local is not None:
            self._local.end_step()
        for bucket in getattr(self.optimizer, "ipg_buckets", {}).values():
            assert not bucket.params, (
                "DeepSpeed finished a backward before its last gradient, which would be lost"
            )

    def _all_reduce_gradients(self) -> None:
        """Sum the local fp32 gradients over dp x cp, in place, in buckets."""
        group = self._topology.dp_cp_group
        if group.size() == 1:
            return
        optimizer = self.optimizer
        if hasattr(
            optimizer, "fp32_groups_gradients_flat"
        ):  # BF16_Optimizer accumulates in flat fp32 buffers
            for flat in optimizer.fp32_groups_gradients_flat:
                dist.all_reduce(flat, group=group)
            return
        bucket: list[torch.Tensor] = []
        for parameters in optimizer.bit16_groups:
            for parameter in parameters:
                gradient = optimizer.get_param_gradient_attribute(parameter)
                assert gradient is not None and gradient.dtype.itemsize >= 4, "no wide gradient to reduce"
                bucket.append(gradient)
                if sum(tensor.numel() for tensor in bucket) >= REDUCE_BUCKET_ELEMENTS:
                    _all_reduce_bucket(bucket, group)
                    bucket = []
        _all_reduce_bucket(bucket, group)


def _all_reduce_bucket(bucket: list[torch.Tensor], group: dist.ProcessGroup) -> None:
    if not bucket:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
    dist.all_reduce(flat, group=group)
    for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))


def deepspeed_config(
    zero: ZeroConfig,
    *,
    precision: PrecisionConfig,
    clip: float,
    hidden_size: int,
    micro_batch_size: int,
    shard_size: int,
) -> dict[str, Any]:
    """DeepSpeed's configuration: fp32 accumulation and reduction in every precision and stage.

    Under bf16 either key alone leaves an error of 1e-3 in the gradient: `grad_accum_dtype` is the sum over
    micro-batches, `communication_data_type` the sum over ranks.
    """
    stage = max(1, zero.stage)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "train_batch_size": micro_batch_size * shard_size,
        "managed_gradient_accumulation": False,
        # Stage 3 gathers and reduces beside the computation, on streams of its own where the device has streams.
        "zero_optimization": {"stage": stage, "overlap_comm": stage == 3, "contiguous_gradients": True},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": clip,
        "steps_per_print": 10**12,
        # Its timer, which nobody reads, waits for the device before every forward.
        "timers": {"throughput": {"enabled": False}},
    }
    if precision.dtype != Dtype.fp64:
        # Absent, both mean the format of the parameters, which is fp64 then (see `use_double` in compat/deepspeed.py).
        settings |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    if zero.offload:
        settings["zero_optimization"]["offload_optimizer"] = {
            "device": "cpu",
            "pin_memory": torch.cuda.is_available(),
        }
        # torch's fused AdamW has a CPU kernel; DeepSpeed's own would be compiled at the first start.
        settings["zero_force_ds_cpu_optimizer"] = False
    if stage == 3:
        # Norms are too small to be worth a gather each; everything else is sharded, in small models too.
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = hidden_size
    if precision.dtype == Dtype.bf16:
        settings["bf16"] = {"enabled": True}
    if precision.dtype == Dtype.fp16:
        settings["fp16"] = {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": int(math.log2(precision.initial_loss_scale)),
            "loss_scale_window": precision.loss_scale_window,
            "hysteresis": 1,
            "min_loss_scale": MIN_LOSS_SCALE,
        }
    return settings
