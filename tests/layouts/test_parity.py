"""Every layout gives the losses and gradient norms of one process, from a configuration through the real entry."""

import pytest

from tests.support.jobs import run_job, worst_relative

pytestmark = pytest.mark.long

TOLERANCE = 1e-6

LAYOUTS = {
    "zero0": (1, ["zero.stage=0"]),
    "zero2": (1, ["zero.stage=2"]),
    "zero3": (1, ["zero.stage=3"]),
    "micro-batch of 4": (1, ["train.micro_batch_size=4"]),
    "recompute full": (1, ["train.recompute=full"]),
    "recompute selective": (1, ["train.recompute=selective"]),
    **{f"tp2 zero{z}": (2, ["parallel.tp=2", f"zero.stage={z}"]) for z in range(4)},
    **{
        f"tp2 sp zero{z}": (2, ["parallel.tp=2", "parallel.sequence_parallel=true", f"zero.stage={z}"])
        for z in range(4)
    },
    "tp4 with 2 kv heads": (4, ["parallel.tp=4", "model.num_kv_heads=2", "parallel.sequence_parallel=true"]),
    **{f"pp2 zero{z}": (2, ["parallel.pp=2", f"zero.stage={z}"]) for z in range(3)},
    "pp4": (4, ["parallel.pp=4"]),
    "pp2 recompute full": (2, ["parallel.pp=2", "train.recompute=full"]),
    "dp2 micro-batch of 2": (2, ["train.micro_batch_size=2"]),
    **{f"dp2 zero{z}": (2, [f"zero.stage={z}"]) for z in range(4)},
    **{f"tp2 pp2 zero{z}": (4, ["parallel.tp=2", "parallel.pp=2", f"zero.stage={z}"]) for z in range(4)},
    "tp2 sp pp2": (4, ["parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true"]),
    **{f"dp2 pp2 zero{z}": (4, ["parallel.pp=2", f"zero.stage={z}"]) for z in range(3)},
    **{f"tp2 dp2 zero{z}": (4, ["parallel.tp=2", f"zero.stage={z}"]) for z in range(4)},
    **{
        f"tp2 sp dp2 zero{z}": (4, ["parallel.tp=2", "parallel.sequence_parallel=true", f"zero.stage={z}"])
        for z in range(4)
    },
    "tp2 sp dp2 pp2": (
        8,
        ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.pp=2", "zero.stage=2"],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name, oracle, tmp_path):
    world_size, extra = LAYOUTS[name]
    wanted = oracle(extra)
    loss, grad_norm = worst_relative(run_job(tmp_path, world_size, *extra), wanted)
    assert loss <= TOLERANCE and grad_norm <= TOLERANCE, (
        f"{name}: loss {loss:.1e}, gradient norm {grad_norm:.1e}"
    )


def test_the_runs_that_are_compared_learn(oracle):
    losses = [loss for loss, _ in oracle([])]
    assert losses[-1] < losses[0] - 0.05, losses


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("layout", [(1, []), (2, ["parallel.pp=2", "zero.stage=2"]), (2, ["zero.stage=0"])])
def test_low_precision_stays_close_to_fp32(dtype, layout, oracle, tmp_path):
    world_size, extra = layout
    got = run_job(tmp_path, world_size, f"precision.dtype={dtype}", *extra)
    loss, grad_norm = worst_relative(got, oracle([]))
    limit = {"bf16": (2e-3, 3e-2), "fp16": (3e-4, 5e-3)}[dtype]
    assert loss < limit[0] and grad_norm < limit[1], (loss, grad_norm)
    assert (loss, grad_norm) != (0.0, 0.0), "computed in fp32"
