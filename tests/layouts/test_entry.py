"""Layouts through the real entry, from a configuration to metrics.jsonl: the numbers of one process, in fp32.

`test_equality.py` proves every kind of layout; these few prove that a run is what was proved.
"""

from __future__ import annotations

import pytest

from megallama.kernels.attention import core as attention
from tests.support.gates import gated
from tests.support.jobs import run_job, worst_relative

TOLERANCE = 1e-6

PP2, VP2, TIED = "parallel.pp=2", "parallel.vp=2", "model.tie_embeddings=true"
TP2_SP = ("parallel.tp=2", "parallel.sequence_parallel=true")

LAYOUTS = {
    "dp2 zero3": (2, ["zero.stage=3"]),
    "cp2 ring zero2": (2, ["parallel.cp=2", "parallel.cp_kind=ring", "zero.stage=2"]),
    "pp2 vp2 with a smaller last group": (
        2,
        [PP2, VP2, "train.micro_batch_size=1", "train.global_batch_size=7"],
    ),
    "tp2 sp dp2 pp2 vp2 tied zero1 offload": (8, [*TP2_SP, PP2, VP2, TIED, "zero.offload=true"]),
    "qwen tp2 recompute": (
        2,
        ["model.qkv_bias=true", "model.qk_norm=true", "parallel.tp=2", "train.recompute=full"],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_gives_the_numbers_of_one_process(name, oracle, tmp_path):
    world_size, extra = LAYOUTS[name]
    loss, grad_norm = worst_relative(run_job(tmp_path, world_size, *extra), oracle(extra))
    assert loss <= TOLERANCE and grad_norm <= TOLERANCE, (
        f"{name}: loss {loss:.1e}, gradient norm {grad_norm:.1e}"
    )


def test_the_runs_that_are_compared_learn(oracle):
    losses = [loss for loss, _ in oracle([])]
    assert losses[-1] < losses[0] - 0.05, losses


def test_each_setting_of_a_family_changes_the_model(oracle):
    yarn = ["model.rope_scaling=yarn", "model.rope_scaling_factor=4", "model.rope_original_max_seq_len=16"]
    runs = [tuple(oracle(extra)) for extra in ([], ["model.qkv_bias=true"], ["model.qk_norm=true"], yarn)]
    assert len(set(runs)) == len(runs)


def test_a_run_equals_the_mask_written_out(oracle, tmp_path, monkeypatch):
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


# The covering set holds bf16 without offload; nothing else holds fp16, whose loss scale no other format has.
INTERLEAVED = [(2, [PP2, VP2, TIED, f"zero.stage={zero}", "zero.offload=false"]) for zero in (1, 2, 3)]
OFFLOADED = [(2, [PP2, VP2, TIED, f"zero.stage={zero}", "zero.offload=true"]) for zero in (1, 2)]
PLAIN = [(1, []), (2, [PP2, "zero.stage=2"]), (2, ["zero.stage=0"])]
LOW = [*(("fp16", x) for x in (*PLAIN, *INTERLEAVED, *OFFLOADED)), *(("bf16", x) for x in OFFLOADED)]


IN_GATE = [("fp16", INTERLEAVED[2]), ("fp16", OFFLOADED[1]), ("bf16", OFFLOADED[1])]


@pytest.mark.parametrize("case", gated(LOW, gate=IN_GATE), ids=str)
def test_low_precision_stays_close_to_fp32(case, oracle, tmp_path):
    dtype, layout = case
    world_size, extra = layout
    got = run_job(tmp_path, world_size, f"precision.dtype={dtype}", *extra)
    loss, grad_norm = worst_relative(got, oracle(extra))
    limit = {"bf16": (2e-3, 3e-2), "fp16": (3e-4, 5e-3)}[dtype]
    assert loss < limit[0] and grad_norm < limit[1], (loss, grad_norm)
    assert (loss, grad_norm) != (0.0, 0.0), "computed in fp32"


RECOMPUTED = {
    "one rank": (1, []),
    "tp2 sp": (2, [*TP2_SP]),
    "pp2 zero2": (2, [PP2, "zero.stage=2"]),
    "pp2 vp2 tied zero3": (2, [PP2, VP2, TIED, "zero.stage=3"]),
}


@pytest.mark.long
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
