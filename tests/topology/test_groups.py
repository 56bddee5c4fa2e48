"""megatron-core's groups are the ones of grid.py, and a difference stops the job."""

import pytest
import torch.distributed as dist

from megallama.config.schema import ParallelConfig
from megallama.grid import AXES, Grid
from megallama.host.launch import read_launch_environment
from megallama.topology.connect import connect
from megallama.topology.groups import DeepSpeedGroups
from tests.support.ranks import run_ranks


def groups_of(parallel):
    with connect(parallel, environment=read_launch_environment()) as topology:
        axes = ("tp_group", "cp_group", "pp_group", "dp_group", "dp_cp_group", "tp_pp_group")
        fields = (*axes, "own_group", "host_group", "save_group")
        ranks = {name: sorted(dist.get_process_group_ranks(getattr(topology, name))) for name in fields}
        place = tuple(getattr(topology, f"{axis}_rank") for axis in AXES)
        stage = (topology.is_first_stage, topology.is_last_stage)
        mpu = DeepSpeedGroups(topology, shard_group=topology.dp_cp_group)
        deepspeed = (
            mpu.get_data_parallel_group_ranks(),
            mpu.get_data_parallel_rank(),
            mpu.get_data_parallel_world_size(),
            mpu.get_model_parallel_rank(),
            mpu.get_model_parallel_world_size(),
        )
        return ranks, place, stage, deepspeed


LAYOUTS = [
    (4, ParallelConfig(tp=2, pp=2)),
    (4, ParallelConfig(tp=2, cp=2)),
    (8, ParallelConfig(tp=2, pp=2)),
    (8, ParallelConfig(pp=4)),
    (8, ParallelConfig(tp=2, pp=2, cp=2)),
]


@pytest.mark.parametrize(
    ("world_size", "parallel"), LAYOUTS, ids=lambda value: str(getattr(value, "__dict__", value))
)
def test_groups_equal_the_grid(world_size, parallel):
    grid = Grid.from_world_size(world_size, tp=parallel.tp, cp=parallel.cp, pp=parallel.pp)
    for rank, (ranks, place, stage, deepspeed) in enumerate(run_ranks(world_size, groups_of, parallel)):
        wanted = grid.coordinates(rank)
        assert place == tuple(getattr(wanted, axis) for axis in AXES)
        assert stage == (wanted.pp == 0, wanted.pp == grid.pp - 1)
        assert ranks == {
            "tp_group": grid.group_of(rank, "tp"),
            "cp_group": grid.group_of(rank, "cp"),
            "pp_group": grid.group_of(rank, "pp"),
            "dp_group": grid.group_of(rank, "dp"),
            "dp_cp_group": grid.group_of(rank, "dp", "cp"),
            "tp_pp_group": grid.group_of(rank, "tp", "pp"),
            "own_group": [rank],
            "host_group": list(range(world_size)),
            "save_group": list(range(world_size)),
        }
        replicas = grid.group_of(rank, "dp", "cp")
        assert deepspeed == (
            replicas,
            replicas.index(rank),
            len(replicas),
            # The tensor rank alone: see DeepSpeedGroups.
            wanted.tp,
            grid.tp * grid.pp,
        )


def connect_with_another_order(parallel):
    """As if a release of megatron-core laid its ranks out with pp inside dp."""
    from megatron.core import parallel_state

    plain = parallel_state.initialize_model_parallel

    def reordered(**sizes):
        plain(**sizes, order="tp-cp-ep-pp-dp")

    parallel_state.initialize_model_parallel = reordered
    try:
        with connect(parallel, environment=read_launch_environment()):
            return None
    except AssertionError as error:
        return str(error)


def test_a_difference_stops_the_job():
    messages = run_ranks(8, connect_with_another_order, ParallelConfig(tp=2, pp=2))
    # Ranks 0, 1, 6 and 7 lie in different groups as well: dp pairs 0 with 4 instead of 2.
    assert all(message and "grid.py" in message for message in messages), messages
    assert "megatron-core groups ('pp',) as [0, 2], grid.py as [0, 4]" in messages[0]
