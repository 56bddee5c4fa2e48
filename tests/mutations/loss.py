"""Reductions over tp, and the scale of the loss."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from tests.mutations.registry import mutation, scale_loss, wrap_method

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
