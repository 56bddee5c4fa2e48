"""The shipped configurations: published shapes by their parameter counts, and runs that start at their stated size."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megallama.config.load import CONF_DIR, load_config
from megallama.config.schema import ModelConfig, RopeScaling, RunConfig
from tests.config.runs import Vocabulary, problems_of

MODELS = sorted(file.stem for file in (CONF_DIR / "model").glob("*.yaml"))
EXPS = sorted(file.stem for file in (CONF_DIR / "exp").glob("*.yaml"))

PUBLISHED = {
    "llama1_7b": 6_738_415_616,
    "llama1_13b": 13_015_864_320,
    "llama1_30b": 32_528_943_616,
    "llama1_65b": 65_285_660_672,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama31_8b": 8_030_261_248,
    "llama31_70b": 70_553_706_496,
    "llama31_405b": 405_853_388_800,
    "llama32_1b": 1_235_814_400,
    "llama32_3b": 3_212_749_824,
    "qwen25_0_5b": 494_032_768,
    "qwen25_1_5b": 1_543_714_304,
    "qwen25_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_8b": 8_190_735_360,
    "mistral_7b": 7_248_023_552,
}
"""Parameters of the published weights, tied embeddings counted once."""

OWN = {
    "llama_tiny": 0.26e6,
    "llama_1m": 1.2e6,
    "llama_15m": 15e6,
    "llama_60m": 58e6,
    "llama_120m": 120e6,
    "llama_350m": 368e6,
    "llama_1b": 1.02e9,
}
"""Parameters of our small shapes, to 3%."""


def model_named(name: str) -> ModelConfig:
    words = [
        f"model={name}",
        "train.steps=1",
        "train.run_dir=r",
        "train.seq_len=8",
        "train.global_batch_size=1",
    ]
    return load_config([*words, "optim.lr=1"]).model


def parameters(model: ModelConfig) -> int:
    """Counted here from the architecture, without the package's own formula."""
    head_dim = model.head_dim or model.hidden_size // model.num_heads
    q = model.hidden_size * model.num_heads * head_dim
    kv = model.hidden_size * (model.num_kv_heads or model.num_heads) * head_dim
    layer = 2 * q + 2 * kv + 3 * model.hidden_size * model.ffn_hidden_size + 2 * model.hidden_size
    layer += (model.num_heads + 2 * (model.num_kv_heads or model.num_heads)) * head_dim * model.qkv_bias
    layer += 2 * head_dim * model.qk_norm
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    return model.num_layers * layer + embeddings + model.hidden_size


def test_every_model_is_listed_here() -> None:
    assert set(MODELS) == {*PUBLISHED, *OWN}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_have_their_published_size(name: str) -> None:
    model = model_named(name)
    assert parameters(model) == PUBLISHED[name]
    assert f"{PUBLISHED[name]:,} parameters" in (CONF_DIR / "model" / f"{name}.yaml").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("name", OWN)
def test_small_shapes_have_the_size_of_their_name(name: str) -> None:
    assert parameters(model_named(name)) == pytest.approx(OWN[name], rel=0.03)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_named_and_sound(name: str, tmp_path: Path) -> None:
    words = [f"model={name}", "train.steps=1", "train.seq_len=512", "train.global_batch_size=1", "optim.lr=1"]
    config = load_config([*words, "data.sources=[a]", "train.run_dir=r"], working_dir=tmp_path)
    assert config.model.name == name
    assert problems_of(config) == []


def test_generations_differ_as_published() -> None:
    """What a parameter count does not show; Meta's params.json of each release."""
    of = {name: model_named(name) for name in PUBLISHED if name.startswith("llama")}
    assert {name for name, model in of.items() if model.norm_eps == 1e-6} == {
        "llama1_7b",
        "llama1_13b",
        "llama1_30b",
    }
    assert {model.norm_eps for model in of.values()} == {1e-6, 1e-5}
    for name, model in of.items():
        generation = name.split("_")[0]
        assert model.max_seq_len == {"llama1": 2048, "llama2": 4096, "llama3": 8192}.get(generation, 131072)
        assert model.rope_theta == (10000.0 if generation in ("llama1", "llama2") else 500000.0)
        assert model.vocab_size == (32000 if generation in ("llama1", "llama2") else 128256)
        factor = {"llama31": 8.0, "llama32": 32.0}.get(generation, 1.0)
        assert (model.rope_scaling_factor, model.rope_original_max_seq_len) == (factor, 8192)
        assert (model.rope_scaling is RopeScaling.llama3) == (factor > 1)
        assert model.tie_embeddings == (generation == "llama32")


def stated_ranks(name: str) -> int:
    text = (CONF_DIR / "exp" / f"{name}.yaml").read_text(encoding="utf-8")
    (ranks,) = re.findall(r"^# Ranks: (\d+)", text, flags=re.MULTILINE)
    return int(ranks)


def complete_run(name: str, folder: Path) -> RunConfig:
    return load_config([f"+exp={name}"], working_dir=folder)


def test_the_promised_runs_are_there() -> None:
    promised = {"demo", "llama2_7b", "llama2_13b", "llama2_70b", "llama3_8b", "llama3_70b", "llama3_405b"}
    assert promised <= set(EXPS)


@pytest.mark.parametrize("name", EXPS)
def test_every_run_starts_on_its_stated_ranks(name: str, tmp_path: Path) -> None:
    config = complete_run(name, tmp_path)
    vocabulary = Vocabulary(vocab_size=config.model.vocab_size)
    assert problems_of(config, world_size=stated_ranks(name), tokenizer=vocabulary, manifest=vocabulary) == []
    assert Path(config.train.run_dir).name == name
    assert config.data.validation and config.data.tokenizer


@pytest.mark.parametrize(
    ("name", "lr", "last_lr", "warmup", "tokens_per_step", "tokens"),
    [
        ("llama2_7b", 3e-4, 3e-5, 2000, 2**22, 2e12),
        ("llama2_13b", 3e-4, 3e-5, 2000, 2**22, 2e12),
        ("llama2_70b", 1.5e-4, 1.5e-5, 2000, 2**22, 2e12),
        ("llama3_8b", 3e-4, 3e-6, 8000, 2**23, 15e12),
        ("llama3_70b", 1.5e-4, 1.5e-6, 8000, 2**24, 15e12),
        ("llama3_405b", 8e-5, 8e-7, 8000, 2**24, 15.6e12),
    ],
)
def test_runs_have_their_published_settings(
    name: str, lr: float, last_lr: float, warmup: int, tokens_per_step: int, tokens: float, tmp_path: Path
) -> None:
    config = complete_run(name, tmp_path)
    optim, train = config.optim, config.train
    assert (optim.lr, optim.warmup_steps) == (lr, warmup)
    assert optim.lr * optim.min_lr_ratio == pytest.approx(last_lr)
    assert (optim.beta1, optim.beta2, optim.eps, optim.weight_decay, optim.clip) == (
        0.9,
        0.95,
        1e-5,
        0.1,
        1.0,
    )
    assert train.global_batch_size * train.seq_len == tokens_per_step
    assert train.steps * tokens_per_step == pytest.approx(tokens, abs=tokens_per_step)


@pytest.mark.parametrize("name", [name for name in EXPS if name != "demo"])
def test_weights_and_state_fit_the_stated_gpus(name: str, tmp_path: Path) -> None:
    """bf16 weights, fp32 gradients, and 12 bytes of optimizer state shared by ZeRO 1, with room for activations."""
    config = complete_run(name, tmp_path)
    model_ranks = config.parallel.tp * config.parallel.pp
    dp = stated_ranks(name) // model_ranks
    per_rank = parameters(config.model) / model_ranks
    assert per_rank * (2 + 4 + 12 / dp) < 40e9
