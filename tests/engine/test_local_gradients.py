"""ZeRO 2 that reduces once for several micro-batches computes what reducing at each of them does."""

import pytest

from megallama.engine.local_gradients import LocalGradients
from tests.engine.test_zero import PIPELINE, with_engine
from tests.support.gates import gated
from tests.support.jobs import overrides, run_job, worst_relative
from tests.support.ranks import run_ranks

ROUNDING = 1e-6
"""Of fp32 sums in another order; a sum that is rounded to bf16 on its way is 1e-5 off in the norm."""

LAYOUTS = {
    "dp2": (2, []),
    "dp2 pp2 vp2 tied": (4, ["parallel.pp=2", "parallel.vp=2", "model.tie_embeddings=true"]),
    "cp2 recompute": (2, ["parallel.cp=2", "train.recompute=full"]),
    "dp2 offload": (2, ["zero.offload=true"]),
}


@pytest.mark.parametrize("dtype", gated(["fp32", "bf16", "fp16"], gate={"bf16"}))
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_first_gradient_is_the_same_to_fp32_rounding(name, dtype, tmp_path):
    world_size, extra = LAYOUTS[name]
    extra = [*extra, "zero.stage=2", "train.micro_batch_size=1", f"precision.dtype={dtype}", "train.steps=1"]
    often = run_job(tmp_path, world_size, *extra, run_name="often")
    seldom = run_job(tmp_path, world_size, *extra, "zero.accumulate_micro_batches=3", run_name="seldom")
    assert max(worst_relative(seldom, often)) < ROUNDING


@pytest.mark.parametrize("together", gated([2, 3, 8], gate={3}))
def test_five_steps_equal_one_process(together, oracle, tmp_path):
    words = ["zero.stage=2", "train.micro_batch_size=1", f"zero.accumulate_micro_batches={together}"]
    got = run_job(tmp_path, 1, *words)
    assert max(worst_relative(got, oracle([]))) < ROUNDING


def with_one_gradient_never_reduced(engine, module, loader, topology, config):
    local = engine._zero._local
    assert isinstance(local, LocalGradients)
    local._backwards += 1
    with pytest.raises(AssertionError, match=r"\d+ gradients were summed and never reduced"):
        engine.train_step(0, loader.batches(0))


def test_a_gradient_that_is_never_reduced_stops_the_step(tmp_path):
    arguments = overrides(tmp_path, *PIPELINE, "zero.accumulate_micro_batches=3")
    run_ranks(2, with_engine, arguments, with_one_gradient_never_reduced)
