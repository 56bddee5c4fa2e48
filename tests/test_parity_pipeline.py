"""Every pipeline (interleaved, uneven, tied, under each ZeRO stage) gives the numbers of one process."""

import pytest

from tests.jobs import run_job, worst_relative

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
    "pp3 of 5 layers": (3, ["parallel.pp=3", FIVE]),
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
}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """One process; one oracle for each change of the model or batch among the layouts."""
    folder = tmp_path_factory.mktemp("oracle")
    results = {}

    def result(extra):
        key = tuple(word for word in extra if word.startswith(("model.", "train.global")))
        if key not in results:
            results[key] = run_job(folder, 1, *key, run_name=f"oracle{len(results)}")
        return results[key]

    return result


@pytest.mark.parametrize("name", LAYOUTS)
def test_pipeline_equals_one_process(name, oracle, tmp_path):
    world_size, extra = LAYOUTS[name]
    loss, grad_norm = worst_relative(run_job(tmp_path, world_size, *extra), oracle(extra))
    assert loss <= TOLERANCE and grad_norm <= TOLERANCE, (
        f"{name}: loss {loss:.1e}, gradient norm {grad_norm:.1e}"
    )
