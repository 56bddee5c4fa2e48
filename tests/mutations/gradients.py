"""Gradients of micro-batches and replicas, their norm, and the update."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tests.mutations.registry import mutation, sizes, wrap, wrap_method

# Gradient norm and clipping.


@mutation("tp=2")
def replicated_parameters_count_on_every_tp_rank() -> None:
    import megallama.engine.build as build

    def around(engine: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        for parameter in module.parameters():
            parameter.tensor_model_parallel = True
        return engine(module, *args, **kwargs)

    wrap(build, "ZeroEngine", around)


@mutation("tp=2,sp=true")
def sharded_parameters_count_on_one_tp_rank() -> None:
    """A parameter cut over tp without its mark (issue 7452: learnable attention sinks)."""
    import megallama.engine.build as build

    def around(engine: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        for name, parameter in module.named_parameters():
            if "linear_fc2" in name:
                parameter.tensor_model_parallel = False
        return engine(module, *args, **kwargs)

    wrap(build, "ZeroEngine", around)


@mutation("pp=2,zero=2,recompute=full")
def norm_leaves_out_copies_of_later_stages() -> None:
    from megallama.topology.groups import DeepSpeedGroups

    for name in ("get_model_parallel_rank", "get_tensor_model_parallel_rank"):
        setattr(DeepSpeedGroups, name, lambda self: self._topology.tp_pp_group.rank())


@mutation("pp=2,zero=2,recompute=full")
def norm_is_not_summed_over_stages() -> None:
    from megallama.topology.groups import DeepSpeedGroups

    DeepSpeedGroups.get_model_parallel_group = lambda self: self._topology.tp_group


# Gradients of micro-batches and replicas.


@mutation("pp=2,zero=2,recompute=full")
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


@mutation("tp=2,sp=true")
def last_micro_batch_is_skipped() -> None:
    import megallama.engine.build as build

    def around(schedule: Any, stage: Any, batches: Any, **kwargs: Any) -> Any:
        return schedule(stage, batches[:-1] if len(batches) > 1 else batches, **kwargs)

    wrap(build, "run_schedule", around)


@mutation("dp=2,zero=0")
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


@mutation("dp=2,zero=0")
def zero_0_does_not_reduce() -> None:
    from megallama.engine.zero import ZeroEngine

    ZeroEngine._all_reduce_gradients = lambda self: None


@mutation("dp=2,zero=0")
def replicas_read_the_same_samples() -> None:
    import megallama.stream.build as build

    def around(rank_part: Any, *args: Any) -> Any:
        return dataclasses.replace(rank_part(*args), dp_rank=0)

    wrap(build, "rank_part", around)


@mutation("pp=2,zero=2,recompute=full")
def last_stage_reads_micro_batches_in_another_order() -> None:
    from megallama.stream.loader import DataLoader

    def around(batches: Any, self: Any, step: int) -> Any:
        state = sizes()
        is_later = state.get_pipeline_model_parallel_rank() > 0
        return list(reversed(batches(self, step))) if is_later else batches(self, step)

    wrap_method(DataLoader, "batches", around)


@mutation("pp=2,zero=2,recompute=full")
def gradients_are_left_over_on_a_later_stage() -> None:
    from megallama.engine.zero import ZeroEngine

    def around(step: Any, self: Any, lr: float, **kwargs: Any) -> Any:
        result = step(self, lr, **kwargs)
        if sizes().get_pipeline_model_parallel_rank() > 0:
            for parameter in self._engine.module.parameters():
                if parameter.numel():
                    parameter.grad = torch.full_like(parameter, 1e-3)
        return result

    wrap_method(ZeroEngine, "step", around)


# The update.


@mutation("pp=2,zero=2,recompute=full")
def later_stages_are_one_step_ahead_of_the_learning_rate() -> None:
    import megallama.engine.build as build

    def around(rate: Any, optim: Any, *, step: int, total_steps: int) -> float:
        ahead = 1 if sizes().get_pipeline_model_parallel_rank() > 0 else 0
        return rate(optim, step=min(step + ahead, total_steps - 1), total_steps=total_steps)

    wrap(build, "learning_rate", around)


@mutation("tp=2,sp=true")
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


@mutation("dp=2,zero=0")
def a_replica_forgets_its_moments() -> None:
    from megallama.engine.zero import ZeroEngine

    def around(step: Any, self: Any, lr: float, **kwargs: Any) -> Any:
        result = step(self, lr, **kwargs)
        if sizes().get_data_parallel_rank() > 0:
            for state in adam_states(self):
                state["exp_avg"].zero_()
        return result

    wrap_method(ZeroEngine, "step", around)


@mutation("pp=2,zero=2,recompute=full")
def bias_correction_starts_late_on_later_stages() -> None:
    from megallama.engine.zero import ZeroEngine

    def around(step: Any, self: Any, lr: float, **kwargs: Any) -> Any:
        result = step(self, lr, **kwargs)
        if sizes().get_pipeline_model_parallel_rank() > 0:
            for state in adam_states(self):
                state["step"] = state["step"] * 0
        return result

    wrap_method(ZeroEngine, "step", around)


@mutation("pp=2,vp=2,zero=1")
def interleaved_sends_are_batched() -> None:
    """megatron-core 0.16.1 pairs them wrongly with two stages, without an error."""
    import megallama.model.build as build

    def around(pipeline: Any, *args: Any, **kwargs: Any) -> Any:
        settings = pipeline(*args, **kwargs)
        return settings | {"overlap_p2p_comm": False, "batch_p2p_comm": True} if settings else settings

    wrap(build, "_pipeline", around)
