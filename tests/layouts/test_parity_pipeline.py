"""Every pipeline (interleaved, uneven, tied, under each ZeRO stage) gives the numbers of one process."""

import pytest

from tests.support.jobs import run_job, worst_relative

pytestmark = pytest.mark.long

TOLERANCE = 1e-6

PP2, VP2, TIED = "parallel.pp=2", "parallel.vp=2", "model.tie_embeddings=true"
SIX, FIVE = "model.num_layers=6", "model.num_layers=5"

LAYOUTS = {
    "pp2 vp2": (2, [PP2, VP2]),
    "pp2 vp2 zero2": (2, [PP2, VP2, "zero.stage=2"]),
    "pp2 vp2 with a smaller last group": (2, [PP2, VP2, "train.global_batch_size=7"]),
    "dp2 pp2 vp2 zero2": (4, [PP2, VP2, "zero.stage=2"]),
    "tp2 sp pp2 vp2": (4, [PP2, VP2, "parallel.tp=2", "parallel.sequence_parallel=true"]),
    "pp4 vp2": (4, ["parallel.pp=4", VP2, "model.num_layers=8", "zero.stage=2"]),
    "pp3 of 5 layers": (3, ["parallel.pp=3", FIVE, "parallel.layers_per_stage=[2,2,1]"]),
    "pp2 with 1 and 4 layers": (2, [PP2, FIVE, "parallel.layers_per_stage=[1,4]"]),
    "pp2 vp2 with 1 2 2 1 layers": (2, [PP2, VP2, SIX, "parallel.layers_per_stage=[1,2,2,1]"]),
    **{f"tied pp2 zero{z}": (2, [PP2, TIED, f"zero.stage={z}"]) for z in range(3)},
    "tied pp4 zero1": (4, ["parallel.pp=4", TIED]),
    "tied pp2 vp2 zero2": (2, [PP2, VP2, TIED, "zero.stage=2"]),
    "tied tp2 sp pp2 zero2": (
        4,
        [PP2, TIED, "parallel.tp=2", "parallel.sequence_parallel=true", "zero.stage=2"],
    ),
    **{f"tied dp2 pp2 zero{z}": (4, [PP2, TIED, f"zero.stage={z}"]) for z in range(3)},
    "zero3 recompute full": (1, ["zero.stage=3", "train.recompute=full"]),
    "dp2 zero2 recompute full": (2, ["zero.stage=2", "train.recompute=full"]),
    "recompute 2 of 4 layers": (1, ["train.recompute=full", "train.recompute_layers=2"]),
    "dp2 pp2 vp2 zero2 recompute 1 layer": (
        4,
        [PP2, VP2, "model.num_layers=8", "zero.stage=2", "train.recompute=full", "train.recompute_layers=1"],
    ),
    **{f"dp2 zero{z} offload": (2, [f"zero.stage={z}", "zero.offload=true"]) for z in (1, 2)},
    "tp2 dp2 pp2 vp2 tied zero1 offload": (
        8,
        [PP2, VP2, TIED, "parallel.tp=2", "zero.stage=1", "zero.offload=true"],
    ),
    "dp2 pp2 tied zero2 offload": (4, [PP2, TIED, "zero.stage=2", "zero.offload=true"]),
    "dp2 pp2 vp2 zero2 offload": (4, [PP2, VP2, "zero.stage=2", "zero.offload=true"]),
    "dp2 pp2 vp2 tied zero2 reduced seldom": (
        4,
        [PP2, VP2, TIED, "zero.stage=2", "zero.accumulate_micro_batches=3"],
    ),
    "pp2 zero3": (2, [PP2, "zero.stage=3"]),
    "dp2 pp2 zero3": (4, [PP2, "zero.stage=3"]),
    "dp2 pp2 vp2 tied zero3": (4, [PP2, VP2, TIED, "zero.stage=3"]),
    "tied pp2 zero3 recompute full": (2, [PP2, TIED, "zero.stage=3", "train.recompute=full"]),
    "tp2 sp dp2 pp2 tied zero3": (
        8,
        [PP2, TIED, "parallel.tp=2", "parallel.sequence_parallel=true", "zero.stage=3"],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_pipeline_equals_one_process(name, oracle, tmp_path):
    world_size, extra = LAYOUTS[name]
    loss, grad_norm = worst_relative(run_job(tmp_path, world_size, *extra), oracle(extra))
    assert loss <= TOLERANCE and grad_norm <= TOLERANCE, (
        f"{name}: loss {loss:.1e}, gradient norm {grad_norm:.1e}"
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("zero", "offload"), [(1, False), (2, False), (3, False), (1, True), (2, True)])
def test_low_precision_interleaved_and_tied_stays_close_to_fp32(dtype, zero, offload, oracle, tmp_path):
    extra = [PP2, VP2, TIED, f"zero.stage={zero}", f"zero.offload={offload}"]
    got = run_job(tmp_path, 2, f"precision.dtype={dtype}", *extra)
    loss, grad_norm = worst_relative(got, oracle(extra))
    limit = {"bf16": (2e-3, 3e-2), "fp16": (3e-4, 5e-3)}[dtype]
    assert loss < limit[0] and grad_norm < limit[1], (loss, grad_norm)
    assert (loss, grad_norm) != (0.0, 0.0), "computed in fp32"


RECOMPUTED = {
    "one rank": (1, []),
    "tp2 sp": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "pp2 zero2": (2, [PP2, "zero.stage=2"]),
    "pp2 vp2 tied zero3": (2, [PP2, VP2, TIED, "zero.stage=3"]),
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputation_draws_the_same_dropout(name, tmp_path):
    world_size, extra = RECOMPUTED[name]
    extra = [*extra, "model.hidden_dropout=0.1", "train.steps=2"]
    kept = run_job(tmp_path, world_size, *extra, run_name="kept")
    for words in (["train.recompute=full"], ["train.recompute=full", "train.recompute_layers=1"]):
        again = run_job(tmp_path, world_size, *extra, *words, run_name=f"again{len(words)}")
        assert again == kept
    plain = run_job(tmp_path, world_size, *extra, "model.hidden_dropout=0", run_name="plain")
    assert plain != kept, "nothing was dropped"
