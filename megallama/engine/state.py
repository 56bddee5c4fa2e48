"""The master weights and Adam moments in DeepSpeed's flat buffers, as ranges of the local parameters.

DeepSpeed's own `_hp_mapping` is not used: it is wrong with `round_robin_gradients`, and for parameter groups
after the first it never learns of the moments (0.19.8). The ranges follow from the flat buffers, and
`check_fragments` proves them at start: each low-precision value must be the rounded master.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megallama.compat.deepspeed import (
    publish_stage_3_masters,
    stage_3_group,
    stage_3_view,
    stage_3_weight,
    whole_shape,
)
from megallama.engine.fragment import Fragment
from megallama.engine.zero import ZeroEngine

STATES = ("fp32", "exp_avg", "exp_avg_sq")


def prepare_state(zero: ZeroEngine) -> None:
    """Create the Adam state where no step has yet: a fresh optimizer has none."""
    adam = zero.optimizer.optimizer
    if _counts_by_group(adam):
        for group in adam.param_groups:
            group.setdefault("step", 0)
    for flat in _masters(zero.optimizer):
        state = adam.state[flat]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(flat, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(flat, requires_grad=False)
            if _counts_by_group(adam):
                continue
            on_device = bool(adam.defaults.get("fused") or adam.defaults.get("capturable"))
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if on_device else "cpu")


def own_fragments(zero: ZeroEngine, module: torch.nn.Module) -> Iterator[Fragment]:
    """Every range of a parameter that this rank owns, with its views. No copies, no collectives."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    if zero.zero_stage == 3:
        yield from _fragments_of_stage_3(zero, names)
        return
    optimizer = zero.optimizer
    is_written = zero.zero_stage > 0 or zero.is_first_replica
    for index, (parameters, low, master) in enumerate(_groups(optimizer)):
        size = master.numel()
        begin = size * dist.get_rank(optimizer.real_dp_process_group[index])
        tensors = {"fp32": master, **_moments(optimizer, master)}
        for parameter in parameters:
            offset = int(parameter.data.storage_offset() - low.storage_offset())
            first, last = max(offset, begin), min(offset + parameter.numel(), begin + size)
            if first < last:
                views = {k: t.detach().narrow(0, first - begin, last - first) for k, t in tensors.items()}
                yield Fragment(names[id(parameter)], first - offset, last - first, views, is_written)


def _fragments_of_stage_3(zero: ZeroEngine, names: dict[int, str]) -> Iterator[Fragment]:
    has_moments = any("exp_avg" in state for state in zero.optimizer.optimizer.state.values())
    for parameters in zero.optimizer.fp16_groups:
        for parameter in parameters:
            views = {k: stage_3_view(parameter, k) for k in (STATES if has_moments else STATES[:1])}
            size = views["fp32"].numel()
            start = size * dist.get_rank(stage_3_group(parameter))
            owned = max(0, min(size, whole_shape(parameter).numel() - start))  # the rest is padding
            if owned:
                parts = {k: view.detach().view(-1).narrow(0, 0, owned) for k, view in views.items()}
                yield Fragment(names[id(parameter)], start, owned, parts, is_written=True)


def check_fragments(zero: ZeroEngine, module: torch.nn.Module) -> None:
    """Prove the layout of the buffers: weights equal their rounded masters, and all elements are covered."""
    parameters = dict(module.named_parameters())
    covered = 0
    for fragment in own_fragments(zero, module):
        parameter = parameters[fragment.param_name]
        partition = stage_3_weight(parameter)
        if partition is not None:
            low = partition[: fragment.numel]
        else:
            low = parameter.detach().view(-1)[fragment.start : fragment.start + fragment.numel]
        # Offloaded masters lie on the host.
        master = fragment.views["fp32"].to(low.dtype).to(low.device)
        assert torch.equal(low, master), (
            f"{fragment.param_name}: DeepSpeed's buffers are not laid out as expected"
        )
        covered += fragment.numel
    total = torch.tensor(covered, dtype=torch.int64, device=zero.device)
    dist.all_reduce(total, group=zero.shard_group)
    wanted = sum(whole_shape(p).numel() for p in parameters.values())
    assert int(total) == wanted, f"the fragments cover {int(total)} of {wanted} elements"


def publish_masters(zero: ZeroEngine) -> None:
    """Round the masters into the weights that the forward uses, on every rank."""
    optimizer = zero.optimizer
    if zero.zero_stage < 3:
        optimizer.update_lp_params()
        return
    publish_stage_3_masters(optimizer)


def counters(zero: ZeroEngine) -> dict[str, float | int]:
    """Adam's step count and the dynamic loss scale."""
    prepare_state(zero)
    optimizer = zero.optimizer
    adam = optimizer.optimizer
    counted = adam.param_groups[0] if _counts_by_group(adam) else adam.state[_masters(optimizer)[0]]
    step = counted["step"]
    numbers: dict[str, float | int] = {"adam_step": int(step)}
    scaler = getattr(optimizer, "loss_scaler", None)
    if scaler is not None and hasattr(scaler, "cur_iter"):
        numbers |= {
            "loss_scale": float(scaler.cur_scale),
            "loss_scale_iteration": int(scaler.cur_iter),
            "loss_scale_last_overflow": int(scaler.last_overflow_iter),
        }
    return numbers


def load_counters(zero: ZeroEngine, numbers: dict[str, float | int]) -> None:
    """Inverse of `counters`."""
    prepare_state(zero)
    optimizer = zero.optimizer
    adam = optimizer.optimizer
    by_master = [adam.state[flat] for flat in _masters(optimizer)]
    for counted in adam.param_groups if _counts_by_group(adam) else by_master:
        step = counted["step"]
        counted["step"] = (
            torch.full_like(step, numbers["adam_step"])
            if torch.is_tensor(step)
            else int(numbers["adam_step"])
        )
    scaler: Any = getattr(optimizer, "loss_scaler", None)
    if "loss_scale" in numbers and hasattr(scaler, "cur_iter"):  # the run may go on in another precision
        scaler.cur_scale = numbers["loss_scale"]
        scaler.cur_iter = int(numbers["loss_scale_iteration"])
        scaler.last_overflow_iter = int(numbers["loss_scale_last_overflow"])


def _groups(optimizer: Any) -> Iterator[tuple[list[torch.nn.Parameter], torch.Tensor, torch.Tensor]]:
    """(parameters, their flat buffer, this rank's fp32 partition) of each group, stages 0 to 2."""
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        masters = optimizer.single_partition_of_fp32_groups
        yield from zip(optimizer.bit16_groups, optimizer.bit16_groups_flat, masters, strict=True)
    else:  # BF16_Optimizer: bf16 parameters with fp32 accumulation under stages 0 and 1
        masters = optimizer.fp32_groups_flat_partition
        yield from zip(optimizer.bf16_groups, optimizer.bf16_groups_flat, masters, strict=True)


def _counts_by_group(adam: Any) -> bool:
    """NVIDIA apex counts the steps, which correct the bias, in the parameter groups; torch for each parameter."""
    return not isinstance(adam, torch.optim.Adam)


def _masters(optimizer: Any) -> list[torch.Tensor]:
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(optimizer.fp32_partitioned_groups_flat)
    return [master for _, _, master in _groups(optimizer)]


def _moments(optimizer: Any, master: torch.Tensor) -> dict[str, torch.Tensor]:
    state = optimizer.optimizer.state[master]
    return {k: state[k] for k in STATES[1:] if k in state}
