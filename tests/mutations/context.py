"""Context parallelism."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tests.mutations.registry import mutation, scale_loss, sizes, wrap, wrap_method


@mutation("cp=2")
def loss_is_averaged_over_cp_twice() -> None:
    scale_loss(lambda kwargs, batches: 1 / kwargs["topology"].grid.cp)


@mutation("cp=2")
def positions_start_anew_on_every_cp_rank() -> None:
    from megallama.stream.loader import DataLoader

    def around(batch_of: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = batch_of(self, *args, **kwargs)
        if sizes().get_context_parallel_rank() == 0:
            return batch
        length = batch.positions_BS.size(1)
        return dataclasses.replace(batch, positions_BS=torch.arange(length).expand_as(batch.positions_BS))

    wrap_method(DataLoader, "_micro_batch", around)


@mutation("cp=2")
def gradients_of_keys_stay_on_their_cp_rank() -> None:
    import megallama.kernels.attention.context_parallel as context

    def around(give_back: Any, x_SBKD: Any, group: Any) -> Any:
        if group is None or group.size() == 1:
            return give_back(x_SBKD, group)
        return context.to_shards(x_SBKD, cp_size=group.size())[group.rank()].contiguous()

    wrap(context, "_give_back", around)


@mutation("cp=2")
def later_cp_ranks_see_other_documents() -> None:
    from megallama.model.modules import CoreAttention

    def around(forward: Any, self: Any, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        seen = packed_seq_params if sizes().get_context_parallel_rank() == 0 else None
        return forward(self, *args, packed_seq_params=seen, **kwargs)

    wrap_method(CoreAttention, "forward", around)


@mutation("cp=2")
def tokens_are_counted_once_for_every_cp_rank() -> None:
    from megallama.engine.build import Engine

    def around(count: Any, self: Any, batches: Any) -> int:
        return int(count(self, batches) * self._topology.grid.cp)

    wrap_method(Engine, "_count_tokens", around)


@mutation("cp=2,cp_kind=ring,zero=0")
def gradients_are_summed_over_dp_without_cp() -> None:
    """The group of whole sequences in the place of that of all copies (issue 7452: reductions over a wrong group)."""
    from megallama.engine.zero import ZeroEngine

    def around(reduce: Any, self: Any) -> None:
        self._topology = dataclasses.replace(self._topology, dp_cp_group=self._topology.dp_group)
        reduce(self)

    wrap_method(ZeroEngine, "_all_reduce_gradients", around)


@mutation("cp=2,cp_kind=ring,zero=0")
def ring_gradients_end_one_rank_from_home() -> None:
    import megallama.kernels.attention.context_parallel as context

    ring: Any = context.RingAttention
    original = ring.backward

    def around(ctx: Any, grad: Any) -> Any:
        dq, dk, dv, *rest = original(ctx, grad)
        dk, dv = context._Transfer(torch.stack([dk, dv]), ctx.rest[3]).wait()
        return (dq, dk, dv, *rest)

    ring.backward = staticmethod(around)


@mutation("cp=2,cp_kind=ring,zero=0")
def ring_adds_its_parts_without_their_weights() -> None:
    """Each part of the keys has a softmax of its own: they must be merged by its sum."""
    from megallama.kernels.attention.execution import Partial

    def around(add: Any, self: Any, out_old: Any, lse_old: Any, out: Any, lse: Any) -> None:
        add(self, out_old, lse_old, out, torch.where(lse_old.isinf(), lse, lse_old))

    wrap_method(Partial, "add", around)


@mutation("cp=2,cp_kind=ulysses")
def ulysses_brings_heads_back_in_another_order() -> None:
    import megallama.kernels.attention.context_parallel as context

    def around(to_heads: Any, x: Any, group: Any) -> Any:
        heads = to_heads(x, group)
        return heads.roll(heads.size(2) // group.size(), dims=2)

    wrap(context, "_to_heads", around)
