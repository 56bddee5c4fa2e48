"""From command line to RunConfig and back: values, messages, paths, sweeps."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megallama.config.load import load_config, load_yaml, to_yaml
from megallama.config.schema import ModelConfig, Recompute, RunConfig, SourceConfig
from megallama.config.words.sweep import hydra_words, load_sweep
from megallama.host.errors import ConfigError
from tests.config.runs import COMPLETE, small_run


def message_of(*overrides: str, complete: bool = True) -> str:
    """The error of a command line; the small run's words come first."""
    with pytest.raises(ConfigError) as raised:
        load_config([*(COMPLETE + ["train.run_dir=run"] if complete else []), *overrides])
    return str(raised.value)


def test_values_are_typed_and_frozen(tmp_path: Path) -> None:
    config = small_run(
        tmp_path,
        "optim.lr=1e-4",
        "train.recompute=full",
        "parallel.tp=8",
        "log.tensorboard=off",
        "train.steps=1e3",
    )
    assert config.optim.lr == 1e-4 and config.parallel.tp == 8 and config.train.recompute is Recompute.full
    assert config.log.tensorboard is False
    assert config.train.steps == 1000 and isinstance(config.train.steps, int)
    assert isinstance(config.optim.clip, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optim.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.lrr=1", "optim.lrr is not a setting: did you mean optim.lr?"),
        ("lr=1", "lr is not a setting: did you mean optim.lr?"),
        ("train.lr=1", "train.lr is not a setting: did you mean optim.lr?"),
        ("trian.steps=1", "trian.steps is not a setting: did you mean train.steps?"),
        ("modle=llama_1m", "modle is not a setting: did you mean model?"),
        ("train.batch_size=1", "train.batch_size is not a setting: did you mean train."),
        ("parallel.dp=2", "parallel.dp is not a setting: dp is what remains of the ranks"),
        ("optim.momentum=1", "optim.momentum is not a setting: optim has lr, min_lr_ratio"),
        ("foo.bar=1", "foo.bar is not a setting: the sections are model, parallel"),
        ("optim={lr: 1, rate: 2}", "optim.rate is not a setting"),
        ("data.sources=[{path: a, wieght: 2}]", "data.sources.0.wieght is not a setting"),
        ("data.sources.0.weight=2", "data.sources.0.weight is a part of a list: give the list whole"),
        ("+train.seed=1", "+train.seed=1: train.seed exists already: write it without +"),
        ("~train.seed", "~train.seed: a setting cannot be removed"),
        ("train.steps", "override 'train.steps' cannot be read: write section.setting=value"),
        ("train.run_dir=a[b", "override 'train.run_dir=a[b' cannot be read"),
        ("optim.lr=1,2", "optim.lr=1,2 names several values: add --multirun"),
        (
            "model=lama_tiny",
            "model=lama_tiny does not exist: did you mean llama_tiny? available: llama1_13b, ",
        ),
        ("+exp=demmo", "exp=demmo does not exist: did you mean demo? available: demo, llama2_13b"),
        (
            "train.run_dir=${no.such}",
            "the configuration cannot be composed (Interpolation key 'no.such' not found",
        ),
    ],
)
def test_unknown_words_are_named_with_the_nearest(word: str, message: str) -> None:
    assert message in message_of(word)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.steps=many", "train.steps ('many') has the wrong type: expected integer"),
        ("train.steps=1.5", "train.steps (1.5) has the wrong type: expected integer"),
        ("train.steps=true", "train.steps (true) has the wrong type: expected integer"),
        ("train.steps=inf", "train.steps (inf) has the wrong type: expected integer"),
        ("optim.lr=null", "optim.lr (null) has the wrong type: expected number"),
        ("optim.lr=[1]", "optim.lr ([1]) has the wrong type: expected number"),
        ("log.tensorboard=3", "log.tensorboard (3) has the wrong type: expected true or false"),
        (
            "kernels.attention=fast",
            "kernels.attention ('fast') has the wrong type: expected one of auto, sdpa, te, reference",
        ),
        ("model.num_kv_heads=x", "model.num_kv_heads ('x') has the wrong type: expected integer or null"),
        (
            "data.sources=corpus",
            "data.sources ('corpus') has the wrong type: expected list of {path, weight, max_epochs",
        ),
        ("data.sources=[{path: a, weight: heavy}]", "data.sources.0.weight ('heavy') has the wrong type"),
        ("optim=3", "optim (3) must be a section of settings"),
    ],
)
def test_wrong_types_are_named(word: str, message: str) -> None:
    assert message in message_of(word)


def test_all_problems_come_together() -> None:
    text = message_of("optim.lrr=1", "train.steps=many", "modle=x", "optim.clip=[]")
    assert text.startswith("4 problems:")


def test_missing_values_are_listed_with_how_to_set_them() -> None:
    text = message_of(complete=False)
    assert text.startswith(
        "model, train.steps, train.run_dir, train.seq_len, train.global_batch_size, optim.lr have no value"
    )
    assert (
        "model=<name> (llama1_13b, " in text
        and "train.steps=<integer>" in text
        and "optim.lr=<number>" in text
    )
    assert "+exp=<name> (demo, " in text
    assert message_of("train.run_dir=").startswith("train.run_dir has no value: add train.run_dir=<text>")
    assert "data.sources.0.path has no value" in message_of("data.sources=[{weight: 2}]")


def test_exp_and_model_need_no_plus_and_words_win_over_files() -> None:
    for word in ("+exp=llama2_7b", "exp=llama2_7b"):
        config = load_config([word, "+model=llama_tiny", "model.name=mine", "train.steps=7"])
        assert (config.model.hidden_size, config.model.name, config.train.steps) == (64, "mine", 7)


def test_chinese_needs_no_quotes(tmp_path: Path) -> None:
    config = small_run(
        tmp_path,
        "train.run_dir=运行/第一 次",
        "data.sources=[语料/训练,{path: 语料/二, weight: 2}]",
        "data.tokenizer='词表/${model.name}'",
        "log.wandb_project=试验-${model.name}",
    )
    assert config.train.run_dir == f"{tmp_path}/运行/第一 次"
    assert config.data.sources == [
        SourceConfig(f"{tmp_path}/语料/训练"),
        SourceConfig(f"{tmp_path}/语料/二", 2.0),
    ]
    assert config.data.tokenizer == f"{tmp_path}/词表/llama_tiny"
    assert config.log.wandb_project == "试验-llama_tiny"


def test_relative_paths_start_where_the_command_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load_config([*COMPLETE, "train.run_dir=../runs/a", "data.validation=[/abs/v, '~/w']"])
    assert config.train.run_dir == str(tmp_path.parent / "runs" / "a")
    assert [source.path for source in config.data.sources] == [str(tmp_path / "corpus")]
    assert [source.path for source in config.data.validation] == ["/abs/v", "/home/somebody/w"]
    assert config.data.tokenizer is None


def test_own_conf_folder_is_searched(tmp_path: Path) -> None:
    (tmp_path / "exp").mkdir()
    own = "# @package _global_\ndefaults:\n  - override /model: llama_1m\ntrain:\n  steps: 77\n"
    (tmp_path / "exp" / "mine.yaml").write_text(own, encoding="utf-8")
    words = ["exp=mine", "train.run_dir=r", "train.seq_len=8", "train.global_batch_size=1", "optim.lr=1"]
    config = load_config(words, extra_conf_dir=tmp_path)
    assert (config.train.steps, config.model.name) == (77, "llama_1m")
    (tmp_path / "exp" / "mine.yaml").write_text(own + "  setps: 3\n", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"train.setps is not a setting \(in conf/exp/mine.yaml\): did you mean train.steps"
    ):
        load_config(words, extra_conf_dir=tmp_path)
    with pytest.raises(ConfigError, match="exp=mien does not exist: did you mean mine"):
        load_config(["exp=mien"], extra_conf_dir=tmp_path)


def test_missing_conf_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"configuration folder {tmp_path} has no config.yaml"):
        load_config([], conf_dir=tmp_path)


def test_sweep_is_every_combination_in_order() -> None:
    jobs = load_sweep(["exp=demo", "optim.lr=1e-3,3e-3", "train.run_dir=甲,乙", "train.seed=range(1,3)"]).jobs
    assert len(jobs) == 8
    assert [load_config(job).optim.lr for job in jobs] == [1e-3] * 4 + [3e-3] * 4
    assert [Path(load_config(job).train.run_dir).name for job in jobs[:4]] == ["甲", "甲", "乙", "乙"]
    assert {load_config(job).train.seed for job in jobs} == {1, 2}
    names = [
        load_config([*job, "train.run_dir=r"]).model.name
        for job in load_sweep(["exp=demo", "model=glob(llama2*)"]).jobs
    ]
    assert names == ["demo"] * 3  # the run names its model itself
    with pytest.raises(ConfigError, match="model=llma_tiny does not exist"):
        load_sweep(["exp=demo", "model=llama_1m,llma_tiny"])


def test_words_for_hydra() -> None:
    assert hydra_words(["exp=demo", "+model=llama_1m", "train.run_dir=运行"]) == [
        "+exp=demo",
        "model=llama_1m",
        "train.run_dir='运行'",
    ]


def test_yaml_round_trip_is_exact(tmp_path: Path) -> None:
    config = small_run(
        tmp_path, "train.run_dir=运行/1e-4", "optim.lr=1e-7", "data.tokenizer='on'", "model.num_kv_heads=null"
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_yaml(path) == config
    assert "运行" in path.read_text(encoding="utf-8")


@functools.cache
def complete_model() -> ModelConfig:
    return load_config([*COMPLETE, "train.run_dir=r"]).model


NAMES = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda text: text != "???")


@settings(max_examples=60, deadline=None)
@example(name="\x85", path="a\u2028b\u2029\ufeff", rate=0.0, kv=None)
@given(name=NAMES, path=NAMES, rate=st.floats(allow_nan=False), kv=st.none() | st.integers())
def test_yaml_round_trip_of_anything(name: str, path: str, rate: float, kv: int | None) -> None:
    config = RunConfig()
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(complete_model(), name=name, num_kv_heads=kv),
        train=dataclasses.replace(config.train, steps=1, run_dir=path, seq_len=1, global_batch_size=1),
        optim=dataclasses.replace(config.optim, lr=rate),
        data=dataclasses.replace(config.data, sources=[SourceConfig(path=path, weight=rate)], tokenizer=name),
    )
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_bytes(to_yaml(config).encode())
        assert load_yaml(file) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"a: [b", "cannot be read"),
        (b"- 1", "holds no settings"),
        (b"", "holds no settings"),
        (b"optim: {lrr: 1}", "did you mean optim.lr?"),
        (b"model: {name: x}", "model.num_layers is missing in"),
        (b"parallel: {tp: x}", "parallel.tp ('x') has the wrong type"),
    ],
)
def test_damaged_yaml_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        load_yaml(path)
    assert message in str(raised.value) and str(path) in str(raised.value)


def test_yaml_of_an_older_version_takes_defaults(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config).replace("  vocab_multiple: 128\n", ""), encoding="utf-8")
    assert load_yaml(path) == config


def test_loading_and_checking_import_no_torch() -> None:
    program = (
        "import sys; from megallama.preflight import check_run; from megallama.config.load import load_config;"
        " import megallama.config.reference; load_config(['+exp=demo']);"
        " bad = {'torch', 'deepspeed', 'megatron'} & set(sys.modules); sys.exit(f'imported: {bad}' if bad else 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
