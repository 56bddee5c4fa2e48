"""Every rule of `check`: the smallest change that breaks it, and the message that the user then sees."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path

import pytest

from megallama.config.check import check_config
from megallama.config.check_values import ABOVE_ZERO, AT_LEAST_ONE, NOT_NEGATIVE
from megallama.config.load import to_yaml
from megallama.host.errors import ConfigError, UserError
from tests.config.runs import Vocabulary, problems_of, small_run

SIZES = [(f"{key}=0", f"{key} (0) must be at least 1") for key in AT_LEAST_ONE]
SIGNS = [(f"{key}=-1", f"{key} (-1") for key in NOT_NEGATIVE] + [
    (f"{key}=0", f"{key} (0") for key in ABOVE_ZERO
]

YARN = ["model.rope_scaling=yarn", "model.rope_scaling_factor=2", "model.rope_original_max_seq_len=256"]

RULES: list[tuple[list[str], str]] = [
    *(([change], message) for change, message in SIZES + SIGNS),
    # numbers
    (["optim.lr=nan"], "optim.lr (nan) must be a finite number"),
    (["optim.weight_decay=inf"], "optim.weight_decay (inf) must be a finite number"),
    (["data.sources=[{path: a, weight: nan}]"], "data.sources.0.weight (nan) must be a finite number"),
    (["optim.min_lr_ratio=1.5"], "optim.min_lr_ratio (1.5) must be in [0, 1]"),
    (["optim.min_lr_ratio=-0.1"], "optim.min_lr_ratio (-0.1) must be in [0, 1]"),
    (["optim.beta1=1"], "optim.beta1 (1.0) must be in [0, 1)"),
    (["optim.beta2=-0.5"], "optim.beta2 (-0.5) must be in [0, 1)"),
    (["model.hidden_dropout=1"], "model.hidden_dropout (1.0) must be in [0, 1)"),
    (["precision.initial_loss_scale=1000"], "precision.initial_loss_scale (1000) must be a power of two"),
    (
        ["precision.initial_loss_scale=0.5"],
        "precision.initial_loss_scale (0.5) must be a power of two of at least 1",
    ),
    (["train.seed=9223372036854775808"], "train.seed (9223372036854775808) must fit into 64 bits"),
    (
        ["parallel.layers_per_stage=[99999999999999999999]"],
        "parallel.layers_per_stage.0 (99999999999999999999) must",
    ),
    # schedule
    (["optim.warmup_steps=100"], "optim.warmup_steps (100) must be below train.steps (100)"),
    (
        ["optim.schedule=wsd"],
        "optim.decay_steps (0) must be at least 1 with optim.schedule=wsd: a tenth of train.steps (10)",
    ),
    (
        ["optim.schedule=wsd", "optim.warmup_steps=60", "optim.decay_steps=50"],
        "optim.warmup_steps + optim.decay_steps (60 + 50) must not exceed train.steps (100)",
    ),
    (["optim.schedule=wsd", "optim.decay_steps=-1"], "optim.decay_steps (-1)"),
    # model
    (
        ["model.num_heads=5", "model.head_dim=16"],
        "model.num_heads (5) must be a multiple of model.num_kv_heads (2)",
    ),
    (["model.hidden_size=66"], "model.hidden_size (66) must be a multiple of model.num_heads (4)"),
    (["model.head_dim=15"], "model.head_dim (15) must be even"),
    (["model.hidden_size=60"], "model.head_dim (15 = model.hidden_size / model.num_heads) must be even"),
    (
        ["model.rope_scaling_factor=8"],
        "model.rope_scaling_factor (8) has no effect with model.rope_scaling=none",
    ),
    (
        ["model.rope_scaling=linear", "model.rope_scaling_factor=0.5"],
        "model.rope_scaling_factor (0.5) must be at least 1 with model.rope_scaling=linear",
    ),
    (
        ["model.rope_scaling=llama3", "model.rope_scaling_factor=8"],
        "model.rope_original_max_seq_len (8192) must not exceed model.max_seq_len (512)",
    ),
    (
        ["model.rope_scaling=dynamic", "model.rope_scaling_factor=8"],
        "model.rope_original_max_seq_len (8192) must not exceed model.max_seq_len (512) with"
        " model.rope_scaling=dynamic",
    ),
    (
        ["model.rope_scaling=linear", "model.rope_scaling_factor=2", "model.rope_attention_factor=1.5"],
        "model.rope_attention_factor (1.5) has no effect with model.rope_scaling=linear: leave it out, or set"
        " model.rope_scaling=yarn",
    ),
    (
        [*YARN, "model.rope_low_freq_factor=2"],
        "model.rope_low_freq_factor (2) has no effect with model.rope_scaling=yarn",
    ),
    (
        [*YARN, "model.rope_beta_slow=40"],
        "model.rope_beta_slow (40) must be below model.rope_beta_fast (32)",
    ),
    ([*YARN, "model.rope_theta=1"], "model.rope_theta (1) must be above 1 with model.rope_scaling=yarn"),
    (
        [
            "model.rope_scaling=dynamic",
            "model.rope_scaling_factor=2",
            "model.rope_original_max_seq_len=64",
            "model.head_dim=2",
        ],
        "model.head_dim (2) must be above 2 with model.rope_scaling=dynamic",
    ),
    (["train.seq_len=513"], "train.seq_len (513) must not exceed model.max_seq_len (512)"),
    # combinations
    (
        ["parallel.cp=3"],
        "train.seq_len (64) must be a multiple of 2 x parallel.cp (2 x 3 = 6): use 60 or 66",
    ),
    (
        ["parallel.cp=2", "parallel.tp=2", "parallel.sequence_parallel=true", "train.seq_len=36"],
        "train.seq_len (36) must be a multiple of 2 x parallel.cp x parallel.tp, with"
        " parallel.sequence_parallel=true (2 x 2 x 2 = 8): use 32 or 40",
    ),
    (
        ["parallel.cp=4", "parallel.tp=2", "parallel.cp_kind=ulysses"],
        "parallel.cp_kind (ulysses) needs the heads of a tensor rank (model.num_heads / parallel.tp = 4 / 2 = 2)"
        " to be a multiple of parallel.cp (4): use parallel.cp_kind=all_gather or ring, or a smaller cp",
    ),
    (["parallel.vp=2"], "parallel.vp (2) needs parallel.pp (1) above 1"),
    (
        ["parallel.vp=4", "parallel.pp=2"],
        "model.num_layers (4) must be at least parallel.pp x parallel.vp (2 x 4 = 8)",
    ),
    (
        ["parallel.vp=2", "parallel.pp=2", "train.global_batch_size=1"],
        "the interleaved pipeline needs at least as many micro-batches (1) as parallel.pp (2)",
    ),
    (
        ["parallel.pp=2", "parallel.layers_per_stage=[1,2]"],
        "parallel.layers_per_stage ([1, 2]) must be parallel.pp x parallel.vp (2 x 1 = 2) numbers of at least 1 that"
        " add up to model.num_layers (4): use [2,2]",
    ),
    (
        ["parallel.pp=2", "model.num_layers=5"],
        "model.num_layers (5) must be a multiple of parallel.pp (2): use another number of stages, or give the uneven"
        " split with parallel.layers_per_stage=[3,2]",
    ),
    (
        ["parallel.pp=2", "parallel.vp=2", "model.num_layers=6"],
        "model.num_layers (6) must be a multiple of parallel.pp x parallel.vp (2 x 2 = 4)",
    ),
    (["parallel.pp=2", "parallel.layers_per_stage=[4,0]"], "parallel.layers_per_stage ([4, 0]) must be"),
    (["parallel.layers_per_stage=[2,2]"], "parallel.layers_per_stage ([2, 2]) must be"),
    (["zero.stage=4"], "zero.stage (4) must be 0, 1, 2 or 3"),
    (["zero.stage=3", "zero.offload=true"], "zero.offload (true) needs zero.stage (3) 1 or 2"),
    (["zero.stage=0", "zero.offload=true"], "zero.offload (true) needs zero.stage (0) 1 or 2"),
    (
        ["zero.stage=3", "kernels.adam=apex"],
        "kernels.adam (apex) counts steps by parameter group, and zero.stage (3)",
    ),
    (
        ["zero.offload=true", "kernels.adam=apex"],
        "kernels.adam (apex) updates on the GPU, and zero.offload (true)",
    ),
    (["zero.accumulate_micro_batches=2"], "zero.accumulate_micro_batches (2) needs zero.stage=2 (it is 1)"),
    (["zero.stage=3", "zero.accumulate_micro_batches=2"], "stage 3 holds no room for whole gradients"),
    (
        ["zero.stage=2", "zero.accumulate_micro_batches=0"],
        "zero.accumulate_micro_batches (0) must be at least 1",
    ),
    (
        ["zero.stage=2", "zero.accumulate_micro_batches=999"],
        "zero.accumulate_micro_batches (999) must be at most",
    ),
    (
        ["kernels.attention=te", "parallel.cp=2"],
        "kernels.attention (te) cannot cut a sequence (parallel.cp=2)",
    ),
    (
        ["kernels.attention=te", "precision.dtype=fp32"],
        "kernels.attention (te) needs precision.dtype bf16 or fp16",
    ),
    (["zero.stage=-1"], "zero.stage (-1) must be 0, 1, 2 or 3"),
    (["train.recompute_layers=1"], "train.recompute_layers (1) needs train.recompute=full (it is none)"),
    (["train.recompute=full", "train.recompute_layers=0"], "train.recompute_layers (0) must be"),
    (["parallel.sequence_parallel=true"], "parallel.sequence_parallel (true) needs parallel.tp (1) above 1"),
    # data
    (["data.sources=[]"], "data.sources ([]) must name what to train on"),
    (["data.sources=[{path: a, weight: 0}]"], "data.sources have no weight above 0 (all are 0)"),
    (["data.sources=[{path: a, weight: inf}]"], "data.sources.0.weight (inf) must be a finite number"),
    (["data.sources=[{path: a, weight: -1}, {path: b}]"], "data.sources.0.weight (-1 of "),
    (["data.sources=[{path: a, max_epochs: 0}]"], "data.sources.0.max_epochs (0 of "),
    (
        ["data.sources=[{path: a, max_epochs: nan}]"],
        "data.sources.0.max_epochs (nan) must be a finite number",
    ),
    (["data.sources=[{path: a, validation_fraction: 1}]"], "data.sources.0.validation_fraction (1 of "),
    (
        ["data.validation=[{path: a, validation_fraction: 0.1}]"],
        "data.validation.0.validation_fraction (0.1 of ",
    ),
    (
        ["train.steps=9", "data.schedule=[{from_step: 9, sources: [a]}]"],
        "data.schedule.0.from_step (9) must lie between 0 and train.steps (9)",
    ),
    (
        ["data.schedule=[{from_step: 2, sources: [a]}, {from_step: 2, sources: [a]}]"],
        "data.schedule.1.from_step (2) must lie between 2 and train.steps",
    ),
    (["data.schedule=[{from_step: 1}]"], "data.schedule.0.sources ([]) must name what to train on"),
    (
        ["data.schedule=[{from_step: 1, sources: [{path: a, weight: nan}]}]"],
        "data.schedule.0.sources.0.weight (nan) must be a finite number",
    ),
    (["data.validation=[{path: a, weight: -2}]"], "data.validation.0.weight (-2 of "),
]


@pytest.mark.parametrize(("changes", "message"), RULES, ids=[" ".join(changes) for changes, _ in RULES])
def test_rule_names_value_and_remedy(changes: list[str], message: str, tmp_path: Path) -> None:
    problems = problems_of(small_run(tmp_path, *changes), world_size=None)
    matching = [problem for problem in problems if message in problem]
    assert len(matching) == 1, problems


RANK_RULES: list[tuple[int, list[str], str]] = [
    (
        3,
        ["parallel.tp=2"],
        "world_size (3) must be a multiple of tp x pp x cp (2 x 1 x 1 = 2): start 2 or 4 ranks",
    ),
    (
        3,
        [],
        "train.global_batch_size (8) must be a multiple of micro_batch_size x dp_size (1 x 3 = 3): use 6 or 9",
    ),
    (
        2,
        ["train.micro_batch_size=3"],
        "train.global_batch_size (8) must be a multiple of micro_batch_size x dp_size (3 x 2",
    ),
    (8, ["parallel.tp=8"], "model.num_heads (4) must be a multiple of parallel.tp (8): use parallel.tp=4"),
    (
        4,
        ["parallel.tp=4", "model.num_heads=12", "model.num_kv_heads=6", "model.hidden_size=96"],
        "model.num_kv_heads (6) must be a multiple or a divisor of parallel.tp (4): use parallel.tp=3 or 6",
    ),
    (
        12,
        [
            "parallel.tp=12",
            "model.num_heads=12",
            "model.num_kv_heads=4",
            "model.hidden_size=96",
            "model.vocab_multiple=96",
        ],
        "the width of query, key and value (12 + 2 x 4 heads = 160) must be a multiple of parallel.tp (12)",
    ),
    (
        2,
        ["parallel.tp=2", "model.ffn_hidden_size=191"],
        "model.ffn_hidden_size (191) must be a multiple of parallel.tp (2)",
    ),
    (
        4,
        ["parallel.tp=4", "model.vocab_size=510", "model.vocab_multiple=1"],
        "the padded vocabulary (510 to a multiple of model.vocab_multiple 1 = 510)"
        " must be a multiple of parallel.tp (4)",
    ),
    (8, ["parallel.pp=8"], "model.num_layers (4) must be at least parallel.pp x parallel.vp (8 x 1 = 8)"),
    (
        1,
        ["checkpoint.interval=1000", "checkpoint.keep_every=1500"],
        "checkpoint.keep_every (1500) must be a multiple of checkpoint.interval (1000): use 2000",
    ),
    (
        1,
        ["checkpoint.interval=0", "checkpoint.keep_every=50"],
        "checkpoint.keep_every (50) must be a multiple of checkpoint.interval (0): set checkpoint.interval too",
    ),
    (
        4,
        ["parallel.tp=4", "parallel.sequence_parallel=true", "train.seq_len=66"],
        "train.seq_len (66) must be a multiple of parallel.tp (4) with parallel.sequence_parallel=true: use 64 or 68",
    ),
]


@pytest.mark.parametrize(("world_size", "changes", "message"), RANK_RULES)
def test_rule_on_ranks(world_size: int, changes: list[str], message: str, tmp_path: Path) -> None:
    problems = problems_of(small_run(tmp_path, *changes), world_size=world_size)
    assert len(problems) == 1 and message in problems[0], problems


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, []),
        (4, ["parallel.tp=4", "parallel.sequence_parallel=true"]),  # 2 kv heads over 4 ranks
        (8, ["parallel.tp=2", "parallel.pp=4"]),
        (8, ["zero.stage=3", "parallel.tp=2"]),
        (1, ["model.head_dim=20"]),  # heads need not fill the hidden size
        (1, ["model.rope_scaling=linear", "model.rope_scaling_factor=2"]),
        (1, [*YARN, "model.rope_attention_factor=1.2", "model.rope_beta_fast=16"]),
        (1, ["model.qkv_bias=true", "model.qk_norm=true"]),
        (1, ["model.tie_embeddings=true"]),
        (2, ["model.tie_embeddings=true", "parallel.pp=2"]),
        (3, ["parallel.pp=3", "parallel.layers_per_stage=[1,2,1]"]),
        (4, ["parallel.pp=2", "zero.stage=3"]),
        (2, ["parallel.pp=2", "parallel.vp=2", "train.global_batch_size=7"]),
        (2, ["parallel.pp=2", "parallel.layers_per_stage=[1,3]"]),
        (1, ["optim.schedule=wsd", "optim.warmup_steps=50", "optim.decay_steps=50"]),
        (1, ["checkpoint.interval=50", "checkpoint.keep_every=100"]),
        (1, ["optim.clip=0", "optim.weight_decay=0", "checkpoint.interval=0", "optim.min_lr_ratio=0"]),
    ],
)
def test_sound_runs_pass(world_size: int, changes: list[str], tmp_path: Path) -> None:
    assert problems_of(small_run(tmp_path, *changes), world_size=world_size) == []


def test_unknown_world_size_leaves_out_its_rules(tmp_path: Path) -> None:
    assert problems_of(small_run(tmp_path, "parallel.tp=4"), world_size=None) == []
    (problem,) = problems_of(small_run(tmp_path, "train.micro_batch_size=3"), world_size=None)
    assert problem.startswith("train.global_batch_size (8) must be a multiple")


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    changes = ["model.num_heads=3", "optim.beta1=2", "zero.stage=7", "train.seq_len=9999", "data.sources=[]"]
    config = small_run(tmp_path, *changes)
    with pytest.raises(ConfigError) as raised:
        check_config(
            config,
            world_size=1,
            check_token_file=lambda prefix: [],
            read_manifest=lambda prefix: None,
            load_tokenizer=lambda path: Vocabulary(),
        )
    text = str(raised.value)
    for part in (
        "model.num_heads",
        "model.hidden_size",
        "optim.beta1",
        "zero.stage",
        "train.seq_len",
        "data.sources",
    ):
        assert part in text
    assert len(raised.value.problems) == 6


def test_sizes_that_are_not_positive_do_not_hide_the_rest(tmp_path: Path) -> None:
    problems = problems_of(small_run(tmp_path, "parallel.tp=0", "model.num_heads=0", "optim.beta1=2"))
    assert len(problems) == 3


def test_damaged_data_is_reported_once_for_each_file(tmp_path: Path) -> None:
    config = small_run(
        tmp_path, "data.sources=[good, bad]", "data.validation=[bad]", "data.tokenizer=t.model"
    )
    assert problems_of(config, damaged={"bad": "bad.bin is truncated"}) == ["bad.bin is truncated"]


def test_vocabulary_must_be_the_tokenizers(tmp_path: Path) -> None:
    config = small_run(tmp_path, "data.tokenizer=词/t.model")
    assert problems_of(config) == []
    (problem,) = problems_of(config, tokenizer=Vocabulary(vocab_size=4096))
    assert f"model.vocab_size (512) must be the tokenizer's (4096 in {tmp_path}/词/t.model)" in problem
    assert "set model.vocab_size=4096" in problem
    # Qwen's embeddings have a few rows that no token uses.
    assert problems_of(config, tokenizer=Vocabulary(vocab_size=507)) == []
    for other in (506, 513):
        (problem,) = problems_of(config, tokenizer=Vocabulary(vocab_size=other))
        assert f"set model.vocab_size={other}" in problem
    assert problems_of(config, tokenizer=UserError("no tokenizer there")) == ["no tokenizer there"]


def test_vocabulary_must_be_the_datas(tmp_path: Path) -> None:
    with_tokenizer = small_run(tmp_path, "data.tokenizer=t.model")
    assert problems_of(with_tokenizer, manifest=Vocabulary()) == []
    (problem,) = problems_of(with_tokenizer, manifest=Vocabulary(name="other", sha256="b" * 64))
    assert f"data {tmp_path}/corpus was made with another tokenizer (other)" in problem
    # tokenizer_config.json beside the same tokenizer.json may name another end token later.
    (problem,) = problems_of(with_tokenizer, manifest=Vocabulary(eod_id=7))
    assert "ends its documents with token 7, data.tokenizer" in problem and " with 2: prepare it" in problem
    without = small_run(tmp_path)
    assert problems_of(without, manifest=Vocabulary(vocab_size=500)) == []
    # Data of a begin token and of none is not mixed, nor data of Megatron's told, which has no manifest.
    mixed = small_run(tmp_path, "data.sources=[old, plain, megatron]", "data.validation=[new]")
    made = {"old": Vocabulary(), "plain": Vocabulary(), "new": Vocabulary(begin_id=1)}
    (problem,) = problems_of(mixed, manifest=made)
    old, new = tmp_path / "old", tmp_path / "new"
    assert problem == (
        f"data {new} begins its documents with token 1, data {old} with none: prepare one again, {old} with"
        f" --begin-token always or {new} with --begin-token never"
    )
    (problem,) = problems_of(mixed, manifest={**made, "old": Vocabulary(begin_id=3), "plain": made["new"]})
    assert "with token 3, data" in problem and "with token 1: prepare both again with the same" in problem
    assert problems_of(mixed, manifest=Vocabulary(begin_id=1)) == []
    (problem,) = problems_of(without, manifest=Vocabulary(vocab_size=600))
    assert "model.vocab_size (512) is too small" in problem and "set model.vocab_size=600" in problem


def test_run_dir_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, which in (("file", "it"), ("file/运行/1", str(tmp_path / "file"))):
        (problem,) = problems_of(small_run(tmp_path, f"train.run_dir={place}"))
        assert f"train.run_dir ({tmp_path}/{place}) cannot be a folder: {which} is a file" in problem


def test_run_dir_must_be_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def access(path: Path, mode: int) -> bool:
        return path != tmp_path  # permissions do not bind root, under which tests may run

    monkeypatch.setattr(os, "access", access)
    (problem,) = problems_of(small_run(tmp_path, "train.run_dir=a/b"))
    assert f"train.run_dir ({tmp_path}/a/b) cannot be written: no permission in {tmp_path}" in problem
    assert not (tmp_path / "a").exists()


def test_run_goes_on_only_with_the_same_model(tmp_path: Path) -> None:
    first = small_run(tmp_path)
    folder = Path(first.train.run_dir)
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(first), encoding="utf-8")
    other = small_run(tmp_path, "model.num_layers=8", "model.name=其他")
    assert problems_of(other) == []  # nothing was saved that it would go on from
    (folder / "checkpoints" / "step-10").mkdir(parents=True)
    (problem,) = problems_of(other)
    assert "holds checkpoints of another model (model.num_layers 4 there, 8 here)" in problem
    renamed = dataclasses.replace(first, model=dataclasses.replace(first.model, name="其他"))
    assert problems_of(renamed) == []
    explicit = ["model.head_dim=16", "model.num_kv_heads=2", "model.vocab_multiple=64"]
    assert problems_of(small_run(tmp_path, *explicit)) == [], "the same in other words"
    (problem,) = problems_of(small_run(tmp_path, *YARN))
    assert "(model.rope_attention_factor None there" in problem and "none there, yarn here" in problem


@pytest.mark.parametrize("damage", [b"", b"not: [yaml", b"\xff\x00", b"model: {depth: 3}", None])
def test_a_damaged_configuration_of_the_run_is_no_obstacle(damage: bytes | None, tmp_path: Path) -> None:
    """The start writes it anew, and the checkpoint itself says of which model it is."""
    config = small_run(tmp_path)
    folder = Path(config.train.run_dir)
    (folder / "checkpoints" / "step-10").mkdir(parents=True)
    file = folder / "config.yaml"
    file.mkdir() if damage is None else file.write_bytes(damage)
    assert problems_of(config) == []


def test_named_kernels_must_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other project called apex, or NVIDIA's without its extensions, is not enough."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "apex" else None)
    words = ["kernels.norm=apex", "kernels.adam=apex", "kernels.attention=te", "precision.dtype=bf16"]
    config = small_run(tmp_path, *words)
    problems = problems_of(config)
    assert [problem.split(":")[0] for problem in problems] == [
        "kernels.attention (te) cannot run",
        "kernels.norm (apex) cannot run",
        "kernels.adam (apex) cannot run",
    ]
    assert problems_of(config, world_size=None) == []  # the login node may lack what the ranks have
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert problems_of(config) == []
