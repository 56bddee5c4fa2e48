"""Reductions over tp, and the scale of the loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from tests.mutations.registry import mutation, scale_loss, sizes, wrap, wrap_method

# Reductions over tp.


@mutation("tp=2,sp=true")
def norm_weights_are_not_summed_over_tp() -> None:
    import megallama.model.modules as modules

    modules.copy_to_tensor_model_parallel_region = lambda x, *args, **kwargs: x


@mutation("tp=2,model.qk_norm=true,model.qkv_bias=true")
def head_norm_weights_are_not_summed_over_tp() -> None:
    """Each rank norms its own heads: partial sums without sequence parallelism too (issue 7452: gated delta net)."""
    import megallama.model.modules as modules

    def init(build: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.is_partial = False

    wrap_method(modules.HeadNorm, "__init__", init)


@mutation("tp=2")
def row_parallel_output_is_not_summed() -> None:
    import megatron.core.tensor_parallel.layers as layers

    layers.reduce_from_tensor_model_parallel_region = lambda x, *args, **kwargs: x


@mutation("tp=2")
def column_parallel_input_gradient_is_not_summed() -> None:
    import megatron.core.tensor_parallel.layers as layers
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    layers.copy_to_tensor_model_parallel_region = lambda x, *args, **kwargs: x

    def around(forward: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        self.allreduce_dgrad = False
        return forward(self, *args, **kwargs)

    wrap_method(ColumnParallelLinear, "forward", around)


@mutation("tp=2")
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


@mutation("tp=2")
def exponents_are_summed_over_tp_twice() -> None:
    """As with logits that were gathered before: the loss is off by log tp (issue 7452: GPTModel's labels path)."""
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

    original = VocabParallelCrossEntropy.calculate_cross_entropy_loss

    def around(exponents: Any, predicted: Any, sums: Any) -> Any:
        return original(exponents, predicted, sums * sizes().get_tensor_model_parallel_world_size())

    VocabParallelCrossEntropy.calculate_cross_entropy_loss = staticmethod(around)


@mutation("tp=2,sp=true")
def inputs_that_are_gathered_again_lie_in_another_order() -> None:
    """Sequence parallelism gathers the input of a layer once more for its weights' gradient (issue 7452: MTP)."""
    import megatron.core.tensor_parallel.layers as layers

    class Done:
        def wait(self) -> None:
            pass

    def around(gather: Any, whole: Any, part: Any, *, group: Any, async_op: bool = False) -> Any:
        gather(whole, part, group=group)
        if async_op:  # only the backward asks for it
            whole.copy_(whole.roll(part.size(0), dims=0))
        return Done()

    wrap(layers, "dist_all_gather_func", around)


# Scale of the loss.


@mutation("dp=2,zero=0")
def loss_is_averaged_over_dp_twice() -> None:
    scale_loss(lambda kwargs, batches: 1 / kwargs["topology"].grid.dp)


@mutation("tp=2")
def loss_is_divided_by_micro_batches() -> None:
    scale_loss(lambda kwargs, batches: 1 / len(batches))


@mutation("tp=2")
def loss_is_scaled_by_tp() -> None:
    scale_loss(lambda kwargs, batches: kwargs["topology"].grid.tp)


@mutation("dp=2,zero=0")
def loss_is_a_mean_of_means_over_dp() -> None:
    from megallama.engine.build import Engine

    def around(count: Any, self: Any, batches: Any) -> int:
        local = sum(int(batch.loss_mask_BS.sum()) for batch in batches if batch is not None)
        return max(1, local) * self._topology.grid.dp

    wrap_method(Engine, "_count_tokens", around)


@mutation("cp=2")
def loss_is_a_mean_of_means_over_cp() -> None:
    """Parts of a sequence hold unequal numbers of counted tokens (issue 7452: masked training losses)."""
    from megallama.engine.build import Engine

    def around(count: Any, self: Any, batches: Any) -> int:
        local = torch.tensor(sum(int(batch.loss_mask_BS.sum()) for batch in batches if batch is not None))
        dist.all_reduce(local, group=self._topology.dp_group)
        return max(1, int(local)) * self._topology.grid.cp

    wrap_method(Engine, "_count_tokens", around)


@mutation("tp=2")
def micro_batches_weigh_alike() -> None:
    """However many of their tokens count: the mean of their means (issue 7452: MTP's normalization)."""
    import megallama.engine.build as build

    def around(schedule: Any, stage: Any, batches: Any, **kwargs: Any) -> Any:
        counts = [max(1.0, float(batch.loss_mask_BS.sum())) for batch in batches]
        mean = sum(counts) / len(counts)
        alike = [
            dataclasses.replace(batch, loss_mask_BS=batch.loss_mask_BS.double() * (mean / count))
            for batch, count in zip(batches, counts, strict=True)
        ]
        return schedule(stage, alike, **kwargs)

    wrap(build, "run_schedule", around)


@mutation("dp=2,zero=0")
def reported_loss_is_of_one_replica() -> None:
    from megallama.engine.build import Engine

    def around(total: Any, self: Any, loss_sum: Any, num_tokens: int) -> Any:
        grid = self._topology.grid
        loss_sum = loss_sum * grid.dp if self._topology.dp_rank == 0 else loss_sum * 0
        return total(self, loss_sum, num_tokens)

    wrap_method(Engine, "_sum_over_job", around)
