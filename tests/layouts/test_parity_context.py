"""Context parallelism and packed documents give one process's losses and gradient norms, through the real entry."""

import pytest

from megallama.kernels.attention import core as attention
from tests.support.jobs import run_job, worst_relative

pytestmark = pytest.mark.long

TOLERANCE = 1e-6
KINDS = ("all_gather", "ring", "ulysses")

CP2 = ["parallel.cp=2"]
LAYOUTS = {
    **{f"cp2 {kind}": (2, [*CP2, f"parallel.cp_kind={kind}"]) for kind in KINDS},
    **{
        f"cp2 {kind} recompute {recompute} micro-batch of 2": (
            2,
            [*CP2, f"parallel.cp_kind={kind}", f"train.recompute={recompute}", "train.micro_batch_size=2"],
        )
        for kind, recompute in zip(KINDS, ("selective", "full", "full"), strict=True)
    },
    **{f"cp4 {kind}": (4, ["parallel.cp=4", f"parallel.cp_kind={kind}"]) for kind in KINDS},
    "cp4 ulysses of 2 kv heads": (
        4,
        ["parallel.cp=4", "parallel.cp_kind=ulysses", "model.num_kv_heads=2"],
    ),
    **{
        f"cp2 tp2 sp {kind}": (
            4,
            [*CP2, "parallel.tp=2", "parallel.sequence_parallel=true", f"parallel.cp_kind={kind}"],
        )
        for kind in KINDS
    },
    "cp2 tp2 without sp, 1 kv head": (4, [*CP2, "parallel.tp=2", "model.num_kv_heads=1"]),
    **{f"cp2 pp2 {kind}": (4, [*CP2, "parallel.pp=2", f"parallel.cp_kind={kind}"]) for kind in KINDS},
    **{f"cp2 dp2 zero{z}": (4, [*CP2, f"zero.stage={z}"]) for z in range(4)},
    **{f"cp2 dp2 ring zero{z}": (4, [*CP2, "parallel.cp_kind=ring", f"zero.stage={z}"]) for z in (2, 3)},
    "cp2 pp4, middle stages": (8, [*CP2, "parallel.pp=4", "zero.stage=2"]),
    "cp2 tp2 sp pp2": (
        8,
        [*CP2, "parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true", "zero.stage=2"],
    ),
    "cp2 pp2 vp2 ring, tied": (
        4,
        [*CP2, "parallel.pp=2", "parallel.vp=2", "parallel.cp_kind=ring", "model.tie_embeddings=true"],
    ),
    "cp2 pp2 zero3": (4, [*CP2, "parallel.pp=2", "zero.stage=3"]),
    "reset positions": (1, ["data.reset_positions=true"]),
    "cp2 reset positions, ring": (2, [*CP2, "data.reset_positions=true", "parallel.cp_kind=ring"]),
    "pp4 reset positions": (
        4,
        ["parallel.pp=4", "data.reset_positions=true", "train.micro_batch_size=2"],
    ),
    "reference kernel, cp2": (2, [*CP2, "kernels.attention=reference"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name, oracle, tmp_path):
    world_size, extra = LAYOUTS[name]
    wanted = oracle(extra)
    loss, grad_norm = worst_relative(run_job(tmp_path, world_size, *extra), wanted)
    assert loss <= TOLERANCE and grad_norm <= TOLERANCE, (
        f"{name}: loss {loss:.1e}, gradient norm {grad_norm:.1e}"
    )


def test_run_equals_the_mask_written_out(oracle, tmp_path, monkeypatch):
    """The oracle itself: a whole run on `masked_attention`, and another without its documents, which differs."""
    from tests.support.jobs import metrics, overrides, train

    def run(name, keep_documents):
        def call(_, *tensors, scale, documents, group):
            assert documents is not None and group.size() == 1
            return attention.masked_attention(
                *tensors, scale=scale, documents=documents if keep_documents else None
            )

        monkeypatch.setattr(attention.Attention, "__call__", call)
        train(overrides(tmp_path, run_name=name))
        return [(line["train/loss"], line["train/grad_norm"]) for line in metrics(tmp_path / name)]

    assert max(worst_relative(run("masked", True), oracle([]))) <= TOLERANCE
    assert max(worst_relative(run("leaking", False), oracle([]))) > 1e-4
