"""The bytes that ranks move, counted at torch.distributed, are those of the formula: byte for byte, on every rank.

`tests/layouts/test_equality.py` holds the same for every layout that it proves, in fp64 and summed over the ranks.
"""

from __future__ import annotations

import json
from functools import partial

import pytest

from megallama.grid import Grid
from megallama.host.errors import UserError
from megallama.plan.traffic import activation_bytes, step_traffic
from megallama.verification.job import run_rank
from megallama.verification.layouts import change, parse_layouts
from megallama.verification.shrink import shrink
from megallama.verification.synthetic import write_tokens
from tests.layouts.matrix import base
from tests.support.jobs import overrides, run_job, train
from tests.support.ranks import run_ranks

LAYOUTS = [
    "tp=2,pp=2,ties=true,precision.dtype=bf16",
    "tp=2,sp=true,dp=2,zero=2,precision.dtype=bf16",
    "dp=2,zero=1,precision.dtype=bf16",
    "dp=2,zero=0,precision.dtype=bf16",
    "dp=2,zero=3,precision.dtype=bf16,mbs=2",
    "dp=2,zero=3,gbs=16",
    "dp=2,zero=3,gbs=16,recompute=full",
    "cp=2,recompute=selective,mbs=2,precision.dtype=bf16",
    "cp=2,cp_kind=ring,dp=2,zero=1,precision.dtype=bf16",
    "cp=4,cp_kind=ring,zero=0,precision.dtype=fp64",
    "cp=2,cp_kind=ulysses,pp=2,precision.dtype=bf16",
    "dp=2,zero=1,precision.dtype=fp16",
    "tp=2,dp=2,zero=0,precision.dtype=fp16",
    "pp=2,dp=2,zero=2,ties=true,precision.dtype=fp16",
    "dp=2,zero=3,precision.dtype=fp16",
    "tp=2,dp=2,zero=1,zero.offload=true,precision.dtype=bf16",
    "cp=2,dp=2,zero=2,zero.offload=true,precision.dtype=fp16",
    "dp=2,zero=2,gbs=16,zero.accumulate_micro_batches=3",
    "pp=2,vp=2,dp=2,zero=2,zero.accumulate_micro_batches=4,precision.dtype=bf16",
    "tp=2,sp=true,dp=2,zero=1,model.qk_norm=true,model.qkv_bias=true,precision.dtype=bf16",
    "tp=2,cp=2,zero=3,model.qk_norm=true,model.qkv_bias=true,precision.dtype=fp16",
]


def cut(text, folder):
    """(run cut by the layout, its grid), with data to run it on."""
    (layout,) = parse_layouts(text)
    config = change(base(), {"precision.dtype": "fp32"})
    small = layout.apply(shrink(config, [layout], steps=2))
    write_tokens(folder / "tokens", num_tokens=20_000, vocab_size=small.model.vocab_size, seq_len=32, seed=1)
    small = change(small, {"data.sources": [str(folder / "tokens")], "train.run_dir": str(folder)})
    parallel = small.parallel
    grid = Grid(tp=parallel.tp, cp=parallel.cp, dp=layout.dp, pp=parallel.pp)
    return small, grid


@pytest.mark.parametrize("text", LAYOUTS)
def test_measured_equals_the_formula(text, tmp_path):
    config, grid = cut(text, tmp_path)
    reports = run_ranks(grid.world_size, partial(run_rank, config))
    for rank, report in enumerate(reports):
        wanted = step_traffic(config, grid=grid, place=grid.coordinates(rank))
        assert report.traffic == wanted, f"rank {rank}"


def test_one_process_moves_nothing(tmp_path):
    config, grid = cut("dp=1", tmp_path)
    (report,) = run_ranks(1, partial(run_rank, config))
    assert report.traffic == step_traffic(config, grid=grid, place=grid.coordinates(0)) == {}


def test_a_layer_of_plain_tp_all_reduces_four_activations_for_each_micro_batch(tmp_path):
    """Two forward, two backward (Shoeybi et al. 2019, arXiv:1909.08053, figure 4)."""
    config, grid = cut("tp=2", tmp_path)
    one_more = change(config, {"model.num_layers": config.model.num_layers + 1})
    key, place = ("tp", "all_reduce", "float32"), grid.coordinates(0)
    more, fewer = (step_traffic(c, grid=grid, place=place)[key] for c in (one_more, config))
    assert more - fewer == 4 * config.train.global_batch_size * activation_bytes(config)


def test_what_has_no_formula_is_refused(tmp_path):
    config, grid = cut("pp=2,dp=2,zero=3", tmp_path)
    with pytest.raises(UserError, match="no traffic formula: DeepSpeed keeps or drops"):
        step_traffic(config, grid=grid, place=grid.coordinates(0))


def test_zero_3_gathers_weights_twice_on_the_stages_before_the_last(tmp_path):
    """What docs/parallelism.md says in the place of a formula; each gradient is scattered once."""
    config, grid = cut("pp=2,dp=2,zero=3", tmp_path)
    for rank, report in enumerate(run_ranks(grid.world_size, partial(run_rank, config))):
        gathered, scattered = (
            report.traffic["dp_cp", operation, "float32"] for operation in ("all_gather", "reduce_scatter")
        )
        times = 1 if grid.coordinates(rank).pp == grid.pp - 1 else 2
        assert gathered == pytest.approx(times * scattered, rel=0.01), f"rank {rank}"


def test_metrics_hold_the_bytes_when_asked(tmp_path):
    run_ranks(2, train, overrides(tmp_path, "log.traffic=true", "zero.stage=1"))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    keys = {"traffic/dp_cp/all_reduce/float32_bytes", "traffic/dp_cp/all_gather/float32_bytes"}
    steps = [json.loads(line) for line in lines]
    assert keys <= set(steps[0])
    assert len({step["traffic/dp_cp/all_reduce/float32_bytes"] for step in steps}) == 1


def test_metrics_hold_none_else(tmp_path):
    run_job(tmp_path, 1)
    assert "traffic/" not in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
