"""What families add (qkv bias, norms of query and key heads, YaRN): every layout gives the numbers of one process."""

import pytest

from tests.support.jobs import run_job, worst_relative

pytestmark = pytest.mark.long

TOLERANCE = 1e-6

QWEN2 = ["model.qkv_bias=true", "model.tie_embeddings=true"]
QWEN3 = ["model.qk_norm=true", "model.head_dim=24"]
BOTH = ["model.qkv_bias=true", "model.qk_norm=true"]
YARN = ["model.rope_scaling=yarn", "model.rope_scaling_factor=4", "model.rope_original_max_seq_len=16"]

TP2, SP, PP2 = "parallel.tp=2", "parallel.sequence_parallel=true", "parallel.pp=2"

LAYOUTS = {
    "bias tp2": (2, [*QWEN2, TP2]),
    "bias tp2 sp zero2": (2, [*QWEN2, TP2, SP, "zero.stage=2"]),
    "bias tied pp2": (2, [*QWEN2, PP2]),
    "qk norm tp2": (2, [*QWEN3, TP2]),
    "qk norm tp2 sp": (2, [*QWEN3, TP2, SP]),
    "qk norm tp2 recompute": (2, [*QWEN3, TP2, "train.recompute=full"]),
    "qk norm pp2 zero2": (2, [*QWEN3, PP2, "zero.stage=2"]),
    "both tp4 with 2 kv heads": (4, [*BOTH, "parallel.tp=4", "model.num_kv_heads=2", SP]),
    **{f"both dp2 zero{z}": (2, [*BOTH, f"zero.stage={z}"]) for z in (1, 2, 3)},
    "both tp2 dp2 zero3": (4, [*BOTH, TP2, "zero.stage=3"]),
    "both cp2 yarn": (2, [*BOTH, *YARN, "parallel.cp=2"]),
    "yarn tp2 pp2": (4, [*YARN, TP2, PP2]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_family_equals_one_process(name, oracle, tmp_path):
    world_size, extra = LAYOUTS[name]
    loss, grad_norm = worst_relative(run_job(tmp_path, world_size, *extra), oracle(extra))
    assert loss <= TOLERANCE and grad_norm <= TOLERANCE, (
        f"{name}: loss {loss:.1e}, gradient norm {grad_norm:.1e}"
    )


def test_each_of_them_changes_the_model(oracle):
    runs = [tuple(oracle(extra)) for extra in ([], ["model.qkv_bias=true"], ["model.qk_norm=true"], YARN)]
    assert len(set(runs)) == len(runs)
