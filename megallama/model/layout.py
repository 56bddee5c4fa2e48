"""Where each local parameter lies in the canonical (tp=1, pp=1) model.

megatron-core's `sharded_state_dict` is the source: it knows the canonical name, shape and offset of every
local parameter, fused qkv and gate/up included, whatever the layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

ONE_KEY_PER_TENSOR = {"singleton_local_shards": True}
"""Metadata under which every layer has keys of its own and gate and up are apart."""

GATE_SUFFIX, UP_SUFFIX = "_w", "_v"
"""What megatron-core appends to `linear_fc1.weight` for gate and up."""


@dataclass(frozen=True)
class Piece:
    """`local_param.flatten()[start : start + prod(shape)]` equals `canonical[key][offset : offset + shape]`."""

    key: str
    """Canonical name of the tensor."""
    global_shape: tuple[int, ...]
    """Shape of the whole canonical tensor."""
    offset: tuple[int, ...]
    """Where this piece begins in the canonical tensor."""
    shape: tuple[int, ...]
    """Extent of this piece; row-major contiguous in the local parameter."""
    start: int
    """First element of this piece in the flattened local parameter."""
    is_owner: bool
    """Whether this rank's model-parallel coordinates write it (False on tp replicas)."""


def canonical_layout(module: torch.nn.Module) -> dict[str, tuple[Piece, ...]]:
    """The pieces of every parameter of one megatron-core model chunk, by local parameter name.

    Must be called before ZeRO 3 partitions the parameters. No tensor is copied.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    layout: dict[str, tuple[Piece, ...]] = {}
    # sharded_state_dict is megatron-core's, not torch's: it is not in Module's annotations
    entries = module.sharded_state_dict(metadata=ONE_KEY_PER_TENSOR)  # type: ignore[operator]
    for entry in entries.values():
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory) or id(entry.data) not in names:
            continue
        shards = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        layout[names[id(entry.data)]] = tuple(_piece(shard, entry.data) for shard in shards)
    for name, parameter in module.named_parameters():
        covered = sum(math.prod(piece.shape) for piece in layout.get(name, ()))
        assert covered == parameter.numel(), (
            f"{name}: layout covers {covered} of {parameter.numel()} elements"
        )
    return layout


def _piece(shard: ShardedTensor, parameter: torch.Tensor) -> Piece:
    assert shard.data is not None and shard.data.is_contiguous(), shard.key
    replica = shard.replica_id if isinstance(shard.replica_id, tuple) else (shard.replica_id,)
    return Piece(
        key=shard.key,
        global_shape=tuple(shard.global_shape),
        offset=tuple(shard.global_offset),
        shape=(1,) * shard.prepend_axis_num + tuple(shard.local_shape),
        start=int(shard.data.storage_offset() - parameter.storage_offset()),
        # The last number counts data-parallel replicas, among which ZeRO splits the state itself.
        is_owner=not any(replica[:-1]),
    )
