"""Bugs of composition, planted in the ranks of a layout to see whether `verify` notices.

Each is of a kind that has happened: the kinds in DESIGN.md section 4, and those collected for Megatron-LM in its
issue 7452 (a parameter left out of or counted twice in the norm, a reduction over the wrong group or none, a scale
by the wrong size, a slice of the wrong rank, a stale copy). None shows in one process with one micro-batch, so no
test without ranks could find it; `test_mutations.py` proves that too.

A mutation patches modules in the process of a rank, before the model is built.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

MUTATIONS: dict[str, Callable[[], None]] = {}
"""By name; each function patches this process."""


def mutation(function: Callable[[], None]) -> Callable[[], None]:
    MUTATIONS[function.__name__] = function
    return function


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace `owner.name` by `around(original, ...)`."""
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(functools.partial(around, original)))


def wrap_method(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by `around(original, self, ...)`."""
    original = getattr(owner, name)
    setattr(owner, name, lambda self, *args, **kwargs: around(original, self, *args, **kwargs))


def sizes() -> Any:
    """megatron-core's parallel_state: places and sizes of this rank, once connected."""
    from megatron.core import parallel_state

    return parallel_state


# Reductions over tp.


@mutation
def norm_weights_are_not_summed_over_tp() -> None:
    import megallama.model.modules as modules

    modules.copy_to_tensor_model_parallel_region = lambda x, *args, **kwargs: x


@mutation
def row_parallel_output_is_not_summed() -> None:
    import megatron.core.tensor_parallel.layers as layers

    layers.reduce_from_tensor_model_parallel_region = lambda x, *args, **kwargs: x


@mutation
def column_parallel_input_gradient_is_not_summed() -> None:
    import megatron.core.tensor_parallel.layers as layers
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    layers.copy_to_tensor_model_parallel_region = lambda x, *args, **kwargs: x

    def around(forward: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        self.allreduce_dgrad = False
        return forward(self, *args, **kwargs)

    wrap_method(ColumnParallelLinear, "forward", around)


@mutation
def softmax_sum_is_not_reduced_over_tp() -> None:
    import megatron.core.tensor_parallel.cross_entropy as cross_entropy

    def around(forward: Any, ctx: Any, logits: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        real, calls = dist.all_reduce, []

        def all_but_the_third(tensor: Any, *a: Any, **k: Any) -> Any:
            calls.append(tensor)
            return None if len(calls) == 3 else real(tensor, *a, **k)

        dist.all_reduce = all_but_the_third
        try:
            return forward(ctx, logits, target, *args, **kwargs)
        finally:
            dist.all_reduce = real

    owner: Any = cross_entropy._VocabParallelCrossEntropy
    original = owner.forward
    owner.forward = staticmethod(lambda *args, **kwargs: around(original, *args, **kwargs))


# Scale of the loss.


def scale_loss(factor: Callable[[dict[str, Any], Any], float]) -> None:
    import megallama.engine.build as build

    def around(schedule: Any, stage: Any, batches: Any, **kwargs: Any) -> Any:
        if not kwargs["forward_only"]:
            kwargs["loss_factor"] *= factor(kwargs, batches)
        return schedule(stage, batches, **kwargs)

    wrap(build, "run_schedule", around)


@mutation
def loss_is_averaged_over_dp_twice() -> None:
    scale_loss(lambda kwargs, batches: 1 / kwargs["topology"].grid.dp)


@mutation
def loss_is_divided_by_micro_batches() -> None:
    scale_loss(lambda kwargs, batches: 1 / len(batches))


@mutation
def loss_is_scaled_by_tp() -> None:
    scale_loss(lambda kwargs, batches: kwargs["topology"].grid.tp)


@mutation
def loss_is_a_mean_of_means_over_dp() -> None:
    from megallama.engine.build import Engine

    def around(count: Any, self: Any, batches: Any) -> int:
        local = sum(int(batch.loss_mask_BS.sum()) for batch in batches if batch is not None)
        return max(1, local) * self._topology.grid.dp

    wrap_method(Engine, "_count_tokens", around)


@mutation
def reported_loss_is_of_one_replica() -> None:
    from megallama.engine.build import Engine

    def around(total: Any, self: Any, loss_sum: Any, num_tokens: int) -> Any:
        grid = self._topology.grid
        loss_sum = loss_sum * grid.dp if self._topology.dp_rank == 0 else loss_sum * 0
        return total(self, loss_sum, num_tokens)

    wrap_method(Engine, "_sum_over_job", around)


# Context parallelism.


@mutation
def loss_is_averaged_over_cp_twice() -> None:
    scale_loss(lambda kwargs, batches: 1 / kwargs["topology"].grid.cp)


@mutation
def positions_start_anew_on_every_cp_rank() -> None:
    from megallama.data.loader import DataLoader

    def around(batch_of: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = batch_of(self, *args, **kwargs)
        if sizes().get_context_parallel_rank() == 0:
            return batch
        length = batch.positions_BS.size(1)
        return dataclasses.replace(batch, positions_BS=torch.arange(length).expand_as(batch.positions_BS))

    wrap_method(DataLoader, "_micro_batch", around)


@mutation
def gradients_of_keys_stay_on_their_cp_rank() -> None:
    import megallama.kernels.attention_context as context

    def around(give_back: Any, x_SBKD: Any, group: Any) -> Any:
        if group is None or group.size() == 1:
            return give_back(x_SBKD, group)
        return context.to_shards(x_SBKD, cp_size=group.size())[group.rank()].contiguous()

    wrap(context, "_give_back", around)


@mutation
def later_cp_ranks_see_other_documents() -> None:
    from megallama.model.modules import CoreAttention

    def around(forward: Any, self: Any, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        seen = packed_seq_params if sizes().get_context_parallel_rank() == 0 else None
        return forward(self, *args, packed_seq_params=seen, **kwargs)

    wrap_method(CoreAttention, "forward", around)


@mutation
def tokens_are_counted_once_for_every_cp_rank() -> None:
    from megallama.engine.build import Engine

    def around(count: Any, self: Any, batches: Any) -> int:
        return int(count(self, batches) * self._topology.grid.cp)

    wrap_method(Engine, "_count_tokens", around)


# Gradient norm and clipping.


@mutation
def replicated_parameters_count_on_every_tp_rank() -> None:
    import megallama.engine.build as build

    def around(zero: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        for parameter in module.parameters():
            parameter.tensor_model_parallel = True
        return zero(module, *args, **kwargs)

    wrap(build, "ZeroEngine", around)


@mutation
def sharded_parameters_count_on_one_tp_rank() -> None:
    """A parameter cut over tp without its mark (issue 7452: learnable attention sinks)."""
    import megallama.engine.build as build

    def around(zero: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        for name, parameter in module.named_parameters():
            if "linear_fc2" in name:
                parameter.tensor_model_parallel = False
        return zero(module, *args, **kwargs)

    wrap(build, "ZeroEngine", around)


@mutation
def norm_leaves_out_copies_of_later_stages() -> None:
    from megallama.topology.groups import DeepSpeedGroups

    for name in ("get_model_parallel_rank", "get_tensor_model_parallel_rank"):
        setattr(DeepSpeedGroups, name, lambda self: self._topology.tp_pp_group.rank())


@mutation
def norm_is_not_summed_over_stages() -> None:
    from megallama.topology.groups import DeepSpeedGroups

    DeepSpeedGroups.get_model_parallel_group = lambda self: self._topology.tp_group


# Gradients of micro-batches and replicas.


@mutation
def hook_state_is_not_cleared_before_a_backward() -> None:
    from megallama.engine.zero import ZeroEngine

    def around(begin: Any, self: Any) -> None:
        optimizer = self.optimizer
        optimizer.clear_backward_seen_flag, real = lambda: None, optimizer.clear_backward_seen_flag
        try:
            begin(self)
        finally:
            optimizer.clear_backward_seen_flag = real

    wrap_method(ZeroEngine, "_begin_backward", around)


@mutation
def last_micro_batch_is_skipped() -> None:
    import megallama.engine.build as build

    def around(schedule: Any, stage: Any, batches: Any, **kwargs: Any) -> Any:
        return schedule(stage, batches[:-1] if len(batches) > 1 else batches, **kwargs)

    wrap(build, "run_schedule", around)


@mutation
def gradients_are_reduced_in_bf16() -> None:
    import megallama.engine.zero as zero

    def around(all_reduce: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group")
        if tensor.is_floating_point() and tensor.numel() > 64 and group is not None and group.size() > 1:
            tensor.copy_(tensor.bfloat16())
        return all_reduce(tensor, *args, **kwargs)

    import deepspeed.comm as comm

    wrap(comm, "all_reduce", around)
    wrap(zero.dist, "all_reduce", around)


@mutation
def zero_0_does_not_reduce() -> None:
    from megallama.engine.zero import ZeroEngine

    ZeroEngine._all_reduce_gradients = lambda self: None


@mutation
def replicas_read_the_same_samples() -> None:
    import megallama.data.build as build

    def around(open_loader: Any, config: Any, **kwargs: Any) -> Any:
        return open_loader(config, **{**kwargs, "dp_rank": 0})

    wrap(build, "open_loader", around)


@mutation
def last_stage_reads_micro_batches_in_another_order() -> None:
    from megallama.data.loader import DataLoader

    def around(batches: Any, self: Any, step: int) -> Any:
        state = sizes()
        is_later = state.get_pipeline_model_parallel_rank() > 0
        return list(reversed(batches(self, step))) if is_later else batches(self, step)

    wrap_method(DataLoader, "batches", around)


@mutation
def gradients_are_left_over_on_a_later_stage() -> None:
    from megallama.engine.zero import ZeroEngine

    def around(step: Any, self: Any, lr: float) -> Any:
        result = step(self, lr)
        if sizes().get_pipeline_model_parallel_rank() > 0:
            for parameter in self._engine.module.parameters():
                if parameter.numel():
                    parameter.grad = torch.full_like(parameter, 1e-3)
        return result

    wrap_method(ZeroEngine, "step", around)


# Weights, slices, layers.


def initialize(change: Callable[[Any, Any], Any]) -> None:
    """Let each piece of the initial weights be another one."""
    import megallama.model.build as build

    def around(fill: Any, parameter: Any, pieces: Any, **kwargs: Any) -> Any:
        return fill(parameter, [change(piece, sizes()) for piece in pieces], **kwargs)

    wrap(build, "initialize_parameter", around)


@mutation
def later_stages_count_layers_from_the_one_before() -> None:
    def change(piece: Any, state: Any) -> Any:
        parts = piece.key.split(".")
        if state.get_pipeline_model_parallel_rank() == 0 or "layers" not in parts:
            return piece
        place = parts.index("layers") + 1
        parts[place] = str(int(parts[place]) - 1)
        return dataclasses.replace(piece, key=".".join(parts))

    initialize(change)


@mutation
def qkv_is_the_slice_of_another_tp_rank() -> None:
    def change(piece: Any, state: Any) -> Any:
        if "linear_qkv" not in piece.key or piece.shape == piece.global_shape:
            return piece
        mirrored = piece.global_shape[0] - piece.shape[0] - piece.offset[0]
        return dataclasses.replace(piece, offset=(mirrored, *piece.offset[1:]))

    initialize(change)


@mutation
def gate_and_up_are_swapped_on_later_tp_ranks() -> None:
    def change(piece: Any, state: Any) -> Any:
        if "linear_fc1" not in piece.key or state.get_tensor_model_parallel_rank() == 0:
            return piece
        other = {"_w": "_v", "_v": "_w"}.get(piece.key[-2:], piece.key[-2:])
        return dataclasses.replace(piece, key=piece.key[:-2] + other)

    initialize(change)


@mutation
def frequencies_differ_on_later_stages() -> None:
    import megallama.model.build as build

    def around(frequencies: Any, *args: Any, **kwargs: Any) -> Any:
        return frequencies(*args, **kwargs) * (1 + 0.01 * sizes().get_pipeline_model_parallel_rank())

    wrap(build, "inverse_frequencies", around)


@mutation
def vocabulary_range_is_off_by_one_on_later_tp_ranks() -> None:
    import megatron.core.tensor_parallel.cross_entropy as cross_entropy

    def shifted(range_of: Any, size: int, rank: int, world_size: int) -> Any:
        begin, end = range_of(size, rank, world_size)
        return (begin + 1, end + 1) if rank > 0 else (begin, end)

    utility: Any = cross_entropy.VocabUtility
    original = utility.vocab_range_from_per_partition_vocab_size
    cross_entropy.VocabUtility = type(
        "VocabUtility",
        (utility,),
        {"vocab_range_from_per_partition_vocab_size": staticmethod(functools.partial(shifted, original))},
    )


# Tied weights.


@mutation
def tied_copy_is_stale() -> None:
    from megallama.engine.tie import EmbeddingTie

    EmbeddingTie.publish_weight = lambda self: None


@mutation
def tied_gradients_are_not_summed() -> None:
    from megallama.engine.tie import EmbeddingTie

    def around(collect: Any, self: Any) -> None:
        if self._copy is not None:
            self._gradient.zero_()
        collect(self)

    wrap_method(EmbeddingTie, "collect_gradient", around)


# The update.


@mutation
def later_stages_are_one_step_ahead_of_the_learning_rate() -> None:
    import megallama.engine.build as build

    def around(rate: Any, optim: Any, *, step: int, total_steps: int) -> float:
        ahead = 1 if sizes().get_pipeline_model_parallel_rank() > 0 else 0
        return rate(optim, step=min(step + ahead, total_steps - 1), total_steps=total_steps)

    wrap(build, "learning_rate", around)


@mutation
def norms_decay_under_tp() -> None:
    import megallama.engine.build as build

    def around(groups_of: Any, parameters: Any, *, weight_decay: float) -> Any:
        groups = groups_of(parameters, weight_decay=weight_decay)
        if sizes().get_tensor_model_parallel_world_size() > 1:
            groups = [{**group, "weight_decay": weight_decay} for group in groups]
        return groups

    wrap(build, "parameter_groups", around)


def adam_states(zero: Any) -> list[dict[str, Any]]:
    return [state for state in zero.optimizer.optimizer.state.values() if "exp_avg" in state]


@mutation
def a_replica_forgets_its_moments() -> None:
    from megallama.engine.zero import ZeroEngine

    def around(step: Any, self: Any, lr: float) -> Any:
        result = step(self, lr)
        if sizes().get_data_parallel_rank() > 0:
            for state in adam_states(self):
                state["exp_avg"].zero_()
        return result

    wrap_method(ZeroEngine, "step", around)


@mutation
def bias_correction_starts_late_on_later_stages() -> None:
    from megallama.engine.zero import ZeroEngine

    def around(step: Any, self: Any, lr: float) -> Any:
        result = step(self, lr)
        if sizes().get_pipeline_model_parallel_rank() > 0:
            for state in adam_states(self):
                state["step"] = state["step"] * 0
        return result

    wrap_method(ZeroEngine, "step", around)


@mutation
def interleaved_sends_are_batched() -> None:
    """megatron-core 0.16.1 pairs them wrongly with two stages, without an error."""
    import megallama.model.build as build

    def around(pipeline: Any, config: Any) -> Any:
        settings = pipeline(config)
        return settings | {"overlap_p2p_comm": False, "batch_p2p_comm": True} if settings else settings

    wrap(build, "_pipeline", around)
