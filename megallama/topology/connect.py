"""Creates the process groups of a configuration with megatron-core, and asserts that they match `grid.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megallama.compat.megatron_core import install_cpu_stand_ins
from megallama.config.schema import ParallelConfig
from megallama.grid import Grid
from megallama.host.errors import UserError
from megallama.host.launch import LaunchEnvironment, read_launch_environment, tell_libraries
from megallama.topology.groups import Topology
from megallama.topology.rendezvous import TIMEOUT, meet


@contextmanager
def connect(
    parallel: ParallelConfig, *, environment: LaunchEnvironment | None = None, job_index: int = 0
) -> Iterator[Topology]:
    """Process groups of this job; they are torn down at the end, so that a process can run several jobs.

    Args:
        parallel: Sizes of the axes.
        environment: Rank, world size and rendezvous address; from torchrun's variables if not given.
        job_index: Number of the job in this process (multirun); keeps the rendezvous of two jobs apart.

    Raises:
        UserError: more ranks on this node than GPUs.
    """
    from megatron.core import parallel_state

    environment = environment or read_launch_environment()
    install_cpu_stand_ins()
    tell_libraries(environment)
    device = _device(environment)
    has_cuda = device.type == "cuda"
    if has_cuda:
        torch.cuda.set_device(device)
    # No `device_id`: with it every group has one communicator from the start, and sends in both directions of an
    # interleaved pipeline, which megatron-core overlaps, would wait in one queue for each other. It would also cost a
    # split over all ranks for every group that megatron-core makes, and these are more than ranks.
    dist.init_process_group(
        "nccl" if has_cuda else "gloo",
        store=meet(environment, job=str(job_index)),
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=TIMEOUT,
    )
    has_failed = True
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tp,
            pipeline_model_parallel_size=parallel.pp,
            virtual_pipeline_model_parallel_size=parallel.vp if parallel.vp > 1 else None,
            context_parallel_size=parallel.cp,
            # Nobody uses those; what needs host memory has groups of its own below.
            create_gloo_process_groups=False,
        )
        grid = Grid.from_world_size(environment.world_size, tp=parallel.tp, cp=parallel.cp, pp=parallel.pp)
        yield _topology(grid, environment.rank, device)
        has_failed = False
    finally:
        parallel_state.destroy_model_parallel()
        # NCCL would first wait for collectives that are under way, which the other ranks may never join: after an
        # error nobody would hear of it for as long as TIMEOUT. The end of the process aborts them.
        if not (has_failed and has_cuda):
            dist.destroy_process_group()


def _device(environment: LaunchEnvironment) -> torch.device:
    """This rank's GPU; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    ranks, gpus = environment.local_world_size, torch.cuda.device_count()
    if ranks > gpus:
        raise UserError(
            f"{ranks} ranks on this node with {gpus} visible GPUs: every rank needs its own, so start at most {gpus}"
            f" (--nproc-per-node {gpus}), or set CUDA_VISIBLE_DEVICES= (empty) to train on the CPU"
        )
    return torch.device("cuda", environment.local_rank)


def _topology(grid: Grid, rank: int, device: torch.device) -> Topology:
    from megatron.core import parallel_state

    place = grid.coordinates(rank)
    topology = Topology(
        grid=grid,
        rank=rank,
        tp_rank=place.tp,
        cp_rank=place.cp,
        dp_rank=place.dp,
        pp_rank=place.pp,
        device=device,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        tp_pp_group=parallel_state.get_model_parallel_group(),
        first_last_group=parallel_state.get_embedding_group(check_initialized=False),
        own_group=dist.new_group([rank], use_local_synchronization=True),
        # Collectives on host memory: agreement on errors and stops, loading.
        host_group=dist.new_group(backend="gloo", timeout=TIMEOUT),
        save_group=dist.new_group(backend="gloo", timeout=TIMEOUT),
    )
    for axes, group in (
        (("tp",), topology.tp_group),
        (("cp",), topology.cp_group),
        (("pp",), topology.pp_group),
        (("dp",), topology.dp_group),
        (("dp", "cp"), topology.dp_cp_group),
        (("tp", "pp"), topology.tp_pp_group),
    ):
        ours, theirs = grid.group_of(rank, *axes), dist.get_process_group_ranks(group)
        assert ours == sorted(theirs), f"megatron-core groups {axes} as {theirs}, grid.py as {ours}"
    return topology
