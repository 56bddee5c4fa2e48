"""DeepSpeed: its import, and what of it is private or replaced. Nothing else imports it.

Read in DeepSpeed 0.19.8; `tests/compat/test_deepspeed.py` fails for whatever a new version no longer needs. What the
engine does with it, and why, stands in `engine/zero.py`.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

from megallama.compat.torch import keep_double
from megallama.compat.views import ModuleView

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    # Its logger writes to stdout while it is imported, before it can be asked for quiet.
    logging.disable(logging.WARNING)
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    logging.disable(logging.NOTSET)

VERSION = "0.19.8"

DOUBLE_MODULES = {
    "deepspeed.runtime.engine": "data types of model, accumulation and reduction",
    "deepspeed.runtime.base_optimizer": "format of the master weights",
    "deepspeed.runtime.utils": "norms",
    "deepspeed.runtime.zero.stage_1_and_2": "master weights, norms",
    "deepspeed.runtime.zero.stage3": "master weights, norms",
    "deepspeed.runtime.zero.partition_parameters": "formats that it partitions",
}
"""Modules that name fp32 where they mean the wide format, with what they need it for."""


def initialize(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, *, settings: dict[str, Any], mpu: Any
) -> Any:
    """DeepSpeed's engine round `module`; the process groups exist already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine, _, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings, mpu=mpu, dist_init_required=False
        )
    # At the least loss scale it would raise a plain Exception in the middle of a step, on which no rank can agree. No
    # setting of its configuration says otherwise.
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and scaler.dynamic:
        scaler.raise_error_at_min_scale = False
    return engine


def prepare_process(
    *, device: torch.device, is_double: bool, check_fetch_order: Callable[[list[int]], None]
) -> None:
    """Everything that is replaced in DeepSpeed's modules. Before `initialize`; may be called again.

    Args:
        device: This rank's.
        is_double: The run computes in fp64.
        check_fetch_order: Takes the place of the check that ZeRO 3 fetches parameters in one order on all ranks.
    """
    be_quiet()
    if device.type == "cpu":
        spare_the_compiler()
        allow_fp16_on_cpu()
    use_double(is_double)
    # It compares over all ranks of the job. Pipeline stages differ in the order and in how often they compare, which
    # deadlocks. The function has no argument for a group.
    coordinator: Any = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
    coordinator.assert_ints_same_as_other_ranks = check_fetch_order
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def be_quiet() -> None:
    """Errors only."""
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # Prints memory to stdout while it is built, whatever the log level.
    bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None


def spare_the_compiler() -> None:
    """On CPU it would compile a shared-memory all-reduce at first use; gloo serves instead."""
    # By name: the attribute `deepspeed.comm.torch` is torch itself.
    module: Any = importlib.import_module("deepspeed.comm.torch")
    module.build_shm_op = lambda: None


def allow_fp16_on_cpu() -> None:
    """It asks oneDNN whether fp16 is fast here; torch computes fp16 on every CPU, if slowly."""
    get_accelerator().is_fp16_supported = lambda: True


def use_double(is_on: bool) -> None:
    """Let fp64 stay fp64 in this process, or undo it. May be called again.

    The modules above see a torch whose float32 is float64. This can go when DeepSpeed takes the wide format from the
    parameters.
    """
    view = ModuleView(torch, float32=torch.float64, float=torch.float64, FloatTensor=torch.DoubleTensor)
    for name in (
        *DOUBLE_MODULES,
        type(get_accelerator()).__module__,
    ):  # the last one makes the buffers of norms
        module: Any = importlib.import_module(name)
        module.torch = view if is_on else torch
    keep_double(is_on)


def watch_backwards(engine: Any, *, at_begin: Callable[[], None], at_end: Callable[[], None]) -> None:
    """Call `at_begin` just before the prologue of each backward, and `at_end` after its epilogue."""
    begin, end = engine._backward_prologue, engine._backward_epilogue

    def begin_watched() -> None:
        at_begin()
        begin()

    def end_watched() -> None:
        end()
        at_end()

    engine._backward_prologue, engine._backward_epilogue = begin_watched, end_watched


def expect_scaled_backward(engine: Any) -> None:
    """fp16: only the loss is scaled by `engine.scale`; a gradient from the next stage arrives scaled."""
    engine._manual_backward_expected = True


class GradientHooks:
    """DeepSpeed's hooks of ZeRO 1 and 2 on a parameter's gradient, replaced by others that may call them.

    Args:
        optimizer: DeepSpeed's ZeRO optimizer.
        take: In the place of "a gradient is there, and goes into a bucket": parameter, number of its group.
        to_reduce: In the place of "what is reduced of a parameter".
    """

    def __init__(
        self,
        optimizer: Any,
        *,
        take: Callable[[torch.nn.Parameter, int], None],
        to_reduce: Callable[[torch.nn.Parameter], torch.Tensor | None],
    ) -> None:
        self.reduce: Callable[[torch.nn.Parameter, int], None] = optimizer.process_gradients
        self.gradient_of: Callable[[torch.nn.Parameter], torch.Tensor | None] = (
            optimizer.get_gradient_for_reduction
        )
        optimizer.process_gradients = take
        optimizer.get_gradient_for_reduction = to_reduce
        # Sums are as wide as this; it would bring them to the parameters' format on their way.
        optimizer._gradient_reduction_buffer_dtype = lambda: optimizer.gradient_accumulation_dtype


def gathered(parameter: torch.nn.Parameter) -> AbstractContextManager[None]:
    """A parameter that ZeRO 3 has partitioned, in full for the time of a block; only to be read."""
    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters([parameter])
    return context


def whole_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """The shape of a parameter, also where ZeRO 3 has partitioned it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def stage_3_view(parameter: torch.nn.Parameter, state: str) -> torch.Tensor:
    """This rank's partition of `fp32`, `exp_avg` or `exp_avg_sq` of a ZeRO 3 parameter."""
    view: torch.Tensor = (
        safe_get_local_fp32_param(parameter)
        if state == "fp32"
        else safe_get_local_optimizer_state(parameter, state)
    )
    return view


def stage_3_weight(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """This rank's partition of a weight, flat and perhaps padded; None where ZeRO 3 does not shard it."""
    partition = getattr(parameter, "ds_tensor", None)
    return None if partition is None else partition.detach().view(-1)


def stage_3_group(parameter: torch.nn.Parameter) -> dist.ProcessGroup:
    """The ranks over which ZeRO 3 has partitioned a parameter."""
    group: dist.ProcessGroup = parameter.ds_process_group  # type: ignore[attr-defined]
    return group


def publish_stage_3_masters(optimizer: Any) -> None:
    """Round the masters into the weights. The public `update_lp_params` is of ZeRO 1 and 2."""
    optimizer.checkpoint_event_prologue()
    for index in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    optimizer.checkpoint_event_epilogue()
