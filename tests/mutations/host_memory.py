"""ZeRO with offload, and ZeRO 2 that sums several micro-batches before it reduces."""

from __future__ import annotations

from typing import Any

from tests.mutations.registry import mutation, sizes, wrap_method


@mutation("pp=2,vp=2,zero=2,zero.offload=true,zero.accumulate_micro_batches=3")
def host_memory_keeps_the_last_step_s_sums() -> None:
    """What DeepSpeed 0.19.8 does by itself where a backward reaches one chunk of several."""
    from megallama.engine.zero import ZeroEngine

    def around(step: Any, self: Any, lr: float, **kwargs: Any) -> Any:
        sums = getattr(self.optimizer, "accumulated_grads_in_cpu", {})
        kept = {key: tensor.clone() for key, tensor in sums.items()}
        result = step(self, lr, **kwargs)
        for key, tensor in kept.items():
            sums[key].copy_(tensor)
        return result

    wrap_method(ZeroEngine, "step", around)


@mutation("pp=2,vp=2,zero=2,zero.offload=true,zero.accumulate_micro_batches=3")
def host_memory_is_not_copied_back_on_later_stages() -> None:
    """The updated weights stay where they were updated: the device computes with the old ones."""
    from megallama.engine.zero import ZeroEngine

    def around(step: Any, self: Any, lr: float, **kwargs: Any) -> Any:
        if (
            not getattr(self.optimizer, "cpu_offload", False)
            or not sizes().get_pipeline_model_parallel_rank()
        ):
            return step(self, lr, **kwargs)
        parameters = list(self._engine.module.parameters())
        before = [parameter.detach().clone() for parameter in parameters]
        result = step(self, lr, **kwargs)
        for parameter, old in zip(parameters, before, strict=True):
            parameter.data.copy_(old)
        return result

    wrap_method(ZeroEngine, "step", around)


@mutation("pp=2,vp=2,zero=2,zero.offload=true,zero.accumulate_micro_batches=3")
def host_memory_gets_gradients_in_bf16() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    def around(copy: Any, self: Any, parameter: Any) -> Any:
        parameter.grad.copy_(parameter.grad.bfloat16())
        return copy(self, parameter)

    wrap_method(DeepSpeedZeroOptimizer, "async_inplace_copy_grad_to_fp32_buffer_from_gpu", around)


@mutation("pp=2,vp=2,zero=2,zero.offload=true,zero.accumulate_micro_batches=3")
def local_sums_start_from_the_last_micro_batch_alone() -> None:
    from megallama.engine.local_gradients import LocalGradients

    def around(take: Any, self: Any, parameter: Any, group: int) -> None:
        if self._seen[parameter] == self._period - 1:
            self._sums.pop(parameter, None)
        take(self, parameter, group)

    wrap_method(LocalGradients, "_take", around)
