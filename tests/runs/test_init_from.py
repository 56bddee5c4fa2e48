"""train.init_from: the weights of a checkpoint, a fresh optimizer, any layout."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from megallama.checkpoint.format.integrity import intact_checkpoint
from megallama.checkpoint.format.model_identity import model_identity
from megallama.checkpoint.offline.reader import CheckpointReader
from megallama.checkpoint.offline.writer import CheckpointWriter
from megallama.config.load import load_config
from megallama.host.errors import DamagedError
from megallama.trainer.hooks.base import Hook, RunView
from megallama.trainer.state import TrainState
from tests.support.jobs import metrics, overrides, run_job, train, worst_relative
from tests.support.ranks import run_ranks

LAYOUTS = {
    "tp2 sp": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "pp2 vp2 zero2": (2, ["parallel.pp=2", "parallel.vp=2", "zero.stage=2"]),
    "dp2 zero3": (2, ["zero.stage=3"]),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the finished run `source`, and `weights`: its fp32 tensors alone, as an import writes them."""
    folder = tmp_path_factory.mktemp("训练")
    run_job(folder, 2, "parallel.tp=2", "model.tie_embeddings=true", run_name="source")
    reader = CheckpointReader(folder / "source" / "checkpoints" / "step-00000005")
    parent = folder / "weights" / "checkpoints"
    with CheckpointWriter(parent, step=0, model=reader.model, state={"source": "测试"}) as writer:
        for name, tensor in reader.read_all():
            writer.write(f"fp32/{name}", tensor)
    return folder


def arguments(folder: Path, *words: str, source: str | Path = "weights", run_name: str) -> list[str]:
    """A run from other weights, in `folder`."""
    words = ("model.tie_embeddings=true", "train.steps=3", f"train.init_from={folder / source}", *words)
    return overrides(folder, *words, run_name=run_name)


def train_and_save_first(arguments: list[str]) -> None:
    """One rank of a run that is also saved before its first step."""

    class SaveFirst(Hook):
        def start(self, state: TrainState, run: RunView) -> None:
            run.save(state)

    train(arguments, hooks=[SaveFirst()])


@pytest.fixture(scope="module")
def one_rank(trained: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of a run from these weights in one process."""
    run_ranks(1, train, arguments(trained, run_name="one"))
    return [(line["train/loss"], line["train/grad_norm"]) for line in metrics(trained / "one")]


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_are_taken_bit_for_bit_and_nothing_else(
    name: str, trained: Path, one_rank: list[tuple[float, float]]
) -> None:
    world_size, words = LAYOUTS[name]
    run_name = name.replace(" ", "-")
    run_ranks(
        world_size, train_and_save_first, arguments(trained, *words, source="source", run_name=run_name)
    )
    start = CheckpointReader(trained / run_name / "checkpoints" / "step-00000000")
    source = CheckpointReader(trained / "weights" / "checkpoints" / "step-00000000")
    for key in start.keys:
        wanted = source.read(key) if key.startswith("fp32/") else torch.zeros(start.shape(key))
        assert torch.equal(start.read(key), wanted), key
    assert start.state["engine"]["adam_step"] == 0 and start.state["progress"]["consumed_tokens"] == 0
    lines = metrics(trained / run_name)
    assert [line["progress/step"] for line in lines] == [1, 2, 3]
    got = [(line["train/loss"], line["train/grad_norm"]) for line in lines]
    assert max(worst_relative(got, one_rank)) <= 1e-6
    assert got[0][0] < metrics(trained / "source")[0]["train/loss"] - 0.02, "the weights have learned already"


def test_a_run_with_checkpoints_goes_on_from_these(
    trained: Path, one_rank: list[tuple[float, float]]
) -> None:
    words = arguments(trained, "train.steps=4", source="nowhere", run_name="one")
    run_ranks(1, train, words)
    assert [line["progress/step"] for line in metrics(trained / "one")] == [1, 2, 3, 4]
    text = (trained / "one" / "log" / "rank-00000.log").read_text(encoding="utf-8")
    assert "nowhere) is not used: the run has checkpoints of its own" in text


def test_weights_alone_cannot_be_resumed(trained: Path) -> None:
    with pytest.raises(AssertionError, match="UserError: checkpoint .* holds only weights.*train.init_from="):
        run_ranks(1, train, overrides(trained, "model.tie_embeddings=true", run_name="weights"))


LONGER = [
    *("train.seq_len=64", "model.rope_scaling=yarn", "model.rope_scaling_factor=2"),
    *("model.rope_original_max_seq_len=32", "model.rope_theta=5e4", "model.norm_eps=1e-6"),
]
"""A longer context than that of `trained`, by other frequencies."""


def test_a_longer_context_starts_from_these_weights(trained: Path) -> None:
    words = arguments(trained, *LONGER, source="source", run_name="longer")
    run_ranks(1, train_and_save_first, words)
    start = CheckpointReader(trained / "longer" / "checkpoints" / "step-00000000")
    source = CheckpointReader(trained / "source" / "checkpoints" / "step-00000005")
    assert all(torch.equal(start.read(f"fp32/{n}"), source.read(f"fp32/{n}")) for n in start.names())
    assert (start.model["rope_scaling"], start.model["rope_theta"]) == ("yarn", 5e4), "its own from here on"
    text = (trained / "longer" / "log" / "rank-00000.log").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if "other settings" in line)
    assert (
        "step-00000005 were trained with other settings than this run's (norm_eps: 1e-05 there, 1e-06" in line
    )
    assert "rope_scaling: none there, yarn here; rope_scaling_factor: 1.0 there, 2.0 here; rope_theta" in line
    assert " max_seq_len" not in line and line.split()[2] == "WARNING"
    with pytest.raises(AssertionError, match="another model .*rope_theta 50000.0 there, 10000.0 here"):
        run_ranks(1, train, [*words, "model.rope_theta=1e4"])


def problems(folder: Path, *words: str, source: str | Path) -> list[str]:
    from megallama.trainer.init_from import source_problems

    config = load_config(arguments(folder, *words, source=source, run_name="new"))
    return source_problems(
        Path(str(config.train.init_from)), model=config.model, own=Path(config.train.run_dir) / "checkpoints"
    )


def test_what_is_wrong_is_told_before_the_start(trained: Path, tmp_path: Path) -> None:
    for source in ("weights", "source", "weights/checkpoints", "source/checkpoints/step-00000005"):
        assert problems(trained, source=source) == []
    [text] = problems(trained, source="absent")
    assert text.startswith(f"train.init_from ({trained / 'absent'}): there is no checkpoint: give")
    [text] = problems(trained, "model.num_layers=2", "model.norm_eps=1e-6", source="source")
    assert "holds another model (num_layers: 4 there, 2 here): set" in text
    [text] = problems(trained, "model.qk_norm=true", "model.tie_embeddings=false", source="weights")
    assert "(qk_norm: False there, True here; tie_embeddings: True there, False here): set" in text
    with CheckpointWriter(tmp_path / "damaged", step=0, model={}, state={}) as writer:
        writer.write("fp32/w", torch.ones(100))
    os.truncate(writer.path / "rank-00000.bin", 10)
    [text] = problems(trained, source=writer.path)
    assert "is damaged (rank-00000.bin has 10 bytes, the manifest says 448)" in text


def test_the_newest_intact_one_of_a_run_is_taken_and_a_named_one_must_be_intact(tmp_path: Path) -> None:
    for step in (1, 2):
        with CheckpointWriter(tmp_path / "checkpoints", step=step, model={}, state={}) as writer:
            writer.write("fp32/w", torch.ones(100))
    file = writer.path / "rank-00000.bin"
    file.write_bytes(file.read_bytes().replace(b"\x3f", b"\x3e", 1))
    lines: list[str] = []
    assert intact_checkpoint(tmp_path, log=lines.append).name == "step-00000001"
    assert len(lines) == 1 and "step-00000002 is damaged" in lines[0]
    with pytest.raises(
        DamagedError, match="step-00000002 is damaged .rank-00000.bin does not match.*use another"
    ):
        intact_checkpoint(writer.path, log=lines.append)


def test_relative_paths_start_where_the_command_was_typed(tmp_path: Path) -> None:
    words = [
        "model=llama_tiny",
        "train.steps=1",
        "train.seq_len=8",
        "train.global_batch_size=1",
        "optim.lr=1",
    ]
    words += ["data.sources=[x]", "train.run_dir=run", "train.init_from=权重/a"]
    assert load_config(words, working_dir=tmp_path).train.init_from == str(tmp_path / "权重" / "a")


def test_settings_that_mean_the_same_are_no_difference() -> None:
    from megallama.checkpoint.format.model_identity import model_differences

    facts = model_identity(load_config(arguments(Path("."), run_name="x")).model)
    explicit = {**facts, "head_dim": 16, "num_kv_heads": 2}
    older = {key: value for key, value in explicit.items() if key not in ("rope_theta", "tie_embeddings")}
    assert facts["head_dim"] is None and model_differences(facts, explicit) == []
    assert model_differences(older, facts) == ["tie_embeddings: False there, True here"]
    assert model_differences(facts, {**facts, "head_dim": 32}) == ["head_dim: 16 there, 32 here"]
    assert model_differences(facts, {**facts, "vocab_multiple": 32}) == [], "padded to 128 all the same"
    assert model_differences(facts, {**facts, "vocab_multiple": 96}) == ["vocab_multiple: 128 there, 96 here"]
    assert model_differences(facts, {**facts, "rope_beta_slow": 7.0}) == [], "looked at by yarn alone"
    yarn = {**facts, "rope_scaling": "yarn", "rope_scaling_factor": math.e}
    assert model_differences(yarn, {**yarn, "rope_attention_factor": 1.1}) == []
    assert model_differences(yarn, {**yarn, "rope_beta_slow": 7.0}) == ["rope_beta_slow: 1.0 there, 7.0 here"]
    assert model_differences(facts, {**yarn, "rope_attention_factor": 1.0}) == [
        "rope_attention_factor: None there, 1.0 here",
        "rope_scaling: none there, yarn here",
        "rope_scaling_factor: 1.0 there, 2.718281828459045 here",
    ]


def test_facts_of_a_model_come_back() -> None:
    from megallama.checkpoint.format.model_identity import model_of_identity

    model = load_config(arguments(Path("."), run_name="x")).model
    facts = model_identity(model)
    again = model_of_identity(facts, name=model.name, max_seq_len=model.max_seq_len)
    assert model_identity(again) == facts and again == model
    with pytest.raises(Exception, match="model is not valid in this version .*model.depth"):
        model_of_identity({**facts, "depth": 3}, name="x", max_seq_len=8)
