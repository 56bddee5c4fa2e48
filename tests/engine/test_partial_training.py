"""First steps that train a part of the weights: all else stays bit-equal, in every layout, and layouts agree."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from megallama.checkpoint.offline.reader import CheckpointReader
from megallama.config.load import load_config
from megallama.preflight import check_run
from tests.support.gates import gated
from tests.support.jobs import overrides, run_job, worst_relative

ROWS_FROM = 100
NORMS = "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight"
GATE = "decoder.layers.1.mlp.linear_fc1.weight_w"
PARTIAL = [
    "optim.partial_steps=3",
    f"optim.partial_rows_from={ROWS_FROM}",
    f"optim.partial_parameters=[{NORMS},{GATE}]",
    "optim.weight_decay=0.5",
    "optim.clip=0.05",
    "model.vocab_multiple=16",
]
LAYOUTS = {
    "tp2 sp zero2 bf16": (2, ["parallel.tp=2", "zero.stage=2", "precision.dtype=bf16"]),
    **{f"dp2 zero{z}": (2, [f"zero.stage={z}"]) for z in range(4)},
    "tp2 dp2 zero3": (4, ["parallel.tp=2", "zero.stage=3"]),
    "pp2 tied": (2, ["parallel.pp=2", "model.tie_embeddings=true", "zero.stage=2"]),
    "cp2 zero2": (2, ["parallel.cp=2", "zero.stage=2"]),
    "pp2 vp2 zero1": (2, ["parallel.pp=2", "parallel.vp=2"]),
    "pp2 zero3": (2, ["parallel.pp=2", "zero.stage=3"]),
    "bf16 zero1": (1, ["precision.dtype=bf16"]),
    "fp16 zero2": (1, ["precision.dtype=fp16", "zero.stage=2"]),
}


def tensors(run_dir: Path, step: int, kind: str = "fp32") -> dict[str, torch.Tensor]:
    return dict(CheckpointReader(run_dir / "checkpoints" / f"step-{step:08d}").read_all(kind=kind))


def parts(name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(what stays, what is trained) of a tensor."""
    if name.endswith("linear_qkv.layer_norm_weight") or name == GATE:
        return tensor[:0], tensor
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        return tensor[:ROWS_FROM], tensor[ROWS_FROM:]
    return tensor, tensor[:0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses of one process, by what changes the model."""
    folder = tmp_path_factory.mktemp("alone")
    results = {}

    def result(changes: tuple[str, ...]):
        if changes not in results:
            results[changes] = run_job(folder, 1, *PARTIAL, *changes, run_name=f"run{len(results)}")
        return results[changes]

    return result


@pytest.fixture(scope="module")
def beginning(tmp_path_factory):
    """Run folder with the weights before any step, by what changes the model."""
    folder = tmp_path_factory.mktemp("beginning")
    known = {}

    def run_dir(changes: tuple[str, ...]):
        if changes not in known:
            known[changes] = folder / f"run{len(known)}"
            still = ["train.steps=1", "optim.lr=1e-30"]
            run_job(folder, 1, *PARTIAL, *changes, *still, run_name=known[changes].name)
        return known[changes]

    return run_dir


IN_GATE = {"tp2 dp2 zero3", "pp2 tied", "cp2 zero2", "fp16 zero2", "dp2 zero0"}


@pytest.mark.parametrize("name", gated(LAYOUTS, gate=IN_GATE))
def test_kept_weights_stay_bit_equal_and_layouts_agree(name, alone, beginning, tmp_path):
    world_size, extra = LAYOUTS[name]
    extra = [*extra, "checkpoint.interval=1", "checkpoint.keep=0"]
    changes = tuple(word for word in extra if word.startswith("model.") or word.startswith("precision."))
    start_dir = beginning(changes)
    start = tensors(start_dir, 1)
    got = run_job(tmp_path, world_size, *PARTIAL, *extra, f"train.init_from={start_dir}")
    after = {step: tensors(tmp_path / "run", step) for step in (3, 4)}
    for key, before in start.items():
        kept, trained = parts(key, before)
        kept_after, trained_after = parts(key, after[3][key])
        assert torch.equal(kept_after, kept), key
        assert not trained.numel() or not torch.equal(trained_after, trained), key
        assert not kept.numel() or not torch.equal(parts(key, after[4][key])[0], kept), key
    if "precision" not in str(changes):
        loss, norm = worst_relative(got, alone(changes))
        assert loss < 1e-6 and norm < 1e-6, (loss, norm)


def test_a_resume_inside_the_first_steps_changes_nothing(tmp_path, alone):
    run_job(tmp_path, 1, *PARTIAL, "train.steps=2", "optim.schedule=constant")
    got = run_job(tmp_path, 2, *PARTIAL, "zero.stage=2", "optim.schedule=constant")
    wanted = run_job(tmp_path, 1, *PARTIAL, "optim.schedule=constant", run_name="straight")
    assert max(worst_relative(got, wanted)) < 1e-6


def test_weights_that_were_trained_before_stay_when_the_first_steps_are_prolonged(tmp_path):
    more = ["optim.partial_steps=5", "checkpoint.interval=1", "checkpoint.keep=0"]
    run_job(tmp_path, 1, *PARTIAL, "optim.partial_steps=1", "train.steps=3", *more[1:])
    run_job(tmp_path, 2, *PARTIAL, *more, "zero.stage=2")
    before, after = tensors(tmp_path / "run", 3), tensors(tmp_path / "run", 5)
    for key, tensor in before.items():
        assert torch.equal(parts(key, tensor)[0], parts(key, after[key])[0]), key
    assert any(
        not torch.equal(parts(key, tensor)[1], parts(key, after[key])[1]) for key, tensor in before.items()
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.partial_steps=3"], "would train no parameter"),
        (["optim.partial_rows_from=5"], "have no effect"),
        (["optim.partial_steps=3", "optim.partial_rows_from=128"], r"must be a token id .*0 to 127"),
        (["optim.partial_steps=-1", "optim.partial_rows_from=5"], "must not be negative"),
    ],
)
def test_senseless_settings_are_refused(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        check_run(load_config(overrides(tmp_path, *words)), world_size=1)


def test_patterns_are_compared_with_the_names_of_this_shape(tmp_path):
    for patterns, unknown in (("decoder.layers.?.mlp.*", ""), ("decoder.layers.0.*,decoder.layers.9.*", "9")):
        words = overrides(tmp_path, "optim.partial_steps=3", f"optim.partial_parameters=[{patterns}]")
        with pytest.raises(ValueError, match=r"layers.9.\*\) matches no") if unknown else nullcontext():
            check_run(load_config(words), world_size=1)
