"""Context parallelism."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tests.mutations.registry import mutation, scale_loss, sizes, wrap, wrap_method


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
