"""The topology: this rank's coordinates and its process groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megallama.grid import Grid


@dataclass(frozen=True)
class Topology:
    """Sizes, ranks and groups of every axis. Passed as an object; nothing reads groups from a global."""

    grid: Grid
    rank: int
    tp_rank: int
    cp_rank: int
    dp_rank: int
    pp_rank: int
    device: torch.device
    tp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    tp_pp_group: dist.ProcessGroup
    first_last_group: dist.ProcessGroup | None
    """The first and the last stage of this rank's pipeline; None on the stages between them."""
    own_group: dist.ProcessGroup
    """This rank alone; ZeRO 0 shards over it, that is, not at all."""
    host_group: dist.ProcessGroup
    """All ranks, gloo, for host memory."""
    save_group: dist.ProcessGroup
    """All ranks, gloo, for the thread that saves while training goes on: nothing else may use it."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.grid.world_size

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds the tokens."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pp_rank == self.grid.pp - 1


class DeepSpeedGroups:
    """The `mpu` that DeepSpeed asks for its groups.

    DeepSpeed counts a tp-replicated parameter in the gradient norm where `get_model_parallel_rank()` is 0, so
    that answer is the tensor rank: with the joint tp x pp rank, stages after the first would be left out.
    No `get_sequence_parallel_*`: DeepSpeed would take its own sequence parallelism to be in use.

    Args:
        topology: Groups of this rank.
        shard_group: Over which ranks ZeRO shards and averages.
    """

    def __init__(self, topology: Topology, *, shard_group: dist.ProcessGroup) -> None:
        self._topology = topology
        self._shard_group = shard_group

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The group ZeRO shards over."""
        return self._shard_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of that group."""
        return dist.get_process_group_ranks(self._shard_group)

    def get_data_parallel_world_size(self) -> int:
        """Size of that group."""
        return self._shard_group.size()

    def get_data_parallel_rank(self) -> int:
        """Rank in that group."""
        return self._shard_group.rank()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """tp x pp."""
        return self._topology.tp_pp_group

    def get_model_parallel_world_size(self) -> int:
        """Size of tp x pp."""
        return self._topology.tp_pp_group.size()

    def get_model_parallel_rank(self) -> int:
        """The tensor rank; see the class."""
        return self._topology.tp_rank

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """tp."""
        return self._topology.tp_group

    def get_tensor_model_parallel_rank(self) -> int:
        """Rank in tp."""
        return self._topology.tp_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        """Size of tp."""
        return self._topology.grid.tp

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        """pp."""
        return self._topology.pp_group

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Size of pp."""
        return self._topology.grid.pp
