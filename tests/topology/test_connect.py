"""What connecting does on a node with GPUs, shown on one without: torch is told that there are some."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megallama.config.schema import ParallelConfig
from megallama.host.errors import UserError
from megallama.host.launch import LaunchEnvironment, tell_libraries
from megallama.topology import connect as module
from megallama.topology.connect import connect


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, and what is done to the process group."""
    done = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(str(device)))
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **k: done.append((backend, "device_id" in k))
    )
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroyed"))
    groups = SimpleNamespace(
        initialize_model_parallel=lambda **k: done.append(k["create_gloo_process_groups"]),
        destroy_model_parallel=lambda: None,
    )
    monkeypatch.setattr("megatron.core.parallel_state", groups)
    monkeypatch.setattr(module, "_topology", lambda grid, rank, device: device)
    monkeypatch.setattr(module, "meet", lambda environment, *, job: dist.HashStore())
    return done


PLACE = LaunchEnvironment(rank=3, world_size=4, local_rank=1, local_world_size=2)
CONNECTED = ["cuda:1", ("nccl", False), False]
"""The GPU first; then NCCL without one queue for all sends of a group; no gloo groups of megatron-core."""


def test_every_rank_has_its_gpu_before_its_groups(gpus):
    with connect(ParallelConfig(), environment=PLACE) as device:
        assert device == torch.device("cuda", 1)
    assert gpus == [*CONNECTED, "destroyed"]


def test_after_an_error_nothing_waits_for_the_other_ranks(gpus):
    with pytest.raises(KeyError), connect(ParallelConfig(), environment=PLACE):
        raise KeyError
    assert gpus == CONNECTED


def test_more_ranks_than_gpus_are_refused_on_each_of_them(gpus):
    environment = LaunchEnvironment(rank=0, world_size=3, local_rank=0, local_world_size=3)
    with (
        pytest.raises(UserError, match="3 ranks on this node with 2 visible GPUs"),
        connect(ParallelConfig(), environment=environment),
    ):
        pass
    assert gpus == []


@pytest.mark.parametrize(
    ("given", "is_in_launch_order", "then"), [(None, True, "1"), (None, False, None), ("8", True, "8")]
)
def test_what_was_launched_first_runs_first(given, is_in_launch_order, then, monkeypatch):
    # Set first, so that it is put back at the end whatever the test does.
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", given or "")
    if given is None:
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    monkeypatch.setenv("LOCAL_RANK", "1")
    tell_libraries(PLACE, is_in_launch_order=is_in_launch_order)
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == then
