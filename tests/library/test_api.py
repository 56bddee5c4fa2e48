"""`import megallama`: lazy names, and what is refused before a run begins."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import megallama
from megallama.host.errors import ConfigError
from megallama.trainer.hooks.base import StopTraining
from tests.support.jobs import SMALL, metrics, overrides
from tests.support.places import ROOT
from tests.support.ranks import run_ranks


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, megallama; dir(megallama); megallama.load_config; megallama.RunConfig;"
    code += "print(sorted({'torch', 'megatron', 'deepspeed', 'numpy'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"


def test_every_name_is_there() -> None:
    for name in megallama.__all__:
        assert getattr(megallama, name).__name__ == name
    assert set(megallama.__all__) <= set(dir(megallama))
    assert {"Trainer", "Hook", "build_model", "load_checkpoint", "verify", "connect"} <= set(
        megallama.__all__
    )
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = megallama.nothing


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(megallama.__file__).read_text(encoding="utf-8"))
    imported = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megallama.")
        for alias in node.names
    }
    assert imported == set(megallama.__all__)


def config(*words: str) -> megallama.RunConfig:
    return megallama.load_config([*SMALL, "train.run_dir=unused", *words])


@pytest.mark.parametrize(
    ("arguments", "words", "message"),
    [
        ({"hooks": [print]}, [], "derived from megallama.Hook"),
        ({"loss": torch.nn.CrossEntropyLoss()}, [], "must say what it takes"),
        ({"data": 5}, [], r"data \(5\) gives no samples"),
        ({"data": [[0] * 33]}, ["data.sources=[/some/where]"], r"token files too \(/some/where\)"),
        ({"data": [[0] * 33]}, ["log.samples=true"], "set log.samples=false"),
    ],
)
def test_what_cannot_be_used_is_refused(arguments: Any, words: list[str], message: str) -> None:
    with pytest.raises(megallama.UserError, match=message):
        megallama.Trainer.from_config(config(*words), **arguments)


def test_own_data_lifts_no_other_rule() -> None:
    trainer = megallama.Trainer.from_config(config("train.micro_batch_size=3"), data=[[0] * 33])
    with pytest.raises(ConfigError, match="global_batch_size") as caught:
        trainer.fit()
    assert not any("data.sources" in problem for problem in caught.value.problems)


class Halved(megallama.TokenLoss):
    def __call__(self, losses_BS: torch.Tensor, batch: Any) -> torch.Tensor:
        assert batch.labels_BS.shape == losses_BS.shape
        return losses_BS / 2


class Mean(megallama.LogitsLoss):
    def __call__(self, logits_BSV: torch.Tensor, batch: Any) -> torch.Tensor:
        return logits_BSV.mean()


def fit(words: list[str], arguments: dict[str, Any]) -> str:
    """One rank of a run; what it says where it is refused."""
    try:
        megallama.Trainer.from_config(megallama.load_config(words), **arguments).fit()
    except megallama.UserError as error:
        return str(error)
    return ""


def constant(step: int, total_steps: int) -> float:
    return 1e-4 * (step + 1) if total_steps == 2 else -1.0


def nothing(step: int, total_steps: int) -> float:
    return -1.0


def own_adam(groups: list[dict[str, Any]], optim: megallama.OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=optim.lr, betas=(0.0, 0.9))


def sgd(groups: list[dict[str, Any]], optim: megallama.OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=optim.lr, momentum=0.9)


def test_loss_schedule_and_optimizer_are_used(tmp_path: Path) -> None:
    words = overrides(tmp_path, "train.steps=2", "model.num_layers=2", "eval.interval=1")
    words += [f"data.validation=[{tmp_path}/data/train]", "eval.batches=1", "log.traffic=true"]
    lines = []
    for name, arguments in {
        "plain": {},
        "own": {"loss": Halved(), "schedule": constant, "optimizer": own_adam},
    }.items():
        (said,) = run_ranks(1, fit, [*words, f"train.run_dir={tmp_path / name}"], arguments)
        assert said == ""
        lines.append(metrics(tmp_path / name))
    plain, own = lines
    assert own[0]["train/loss"] == pytest.approx(plain[0]["train/loss"] / 2)
    assert own[0]["train/grad_norm"] == pytest.approx(plain[0]["train/grad_norm"] / 2)
    assert [line["train/lr"] for line in own] == pytest.approx([1e-4, 2e-4])
    assert own[0]["eval/loss"] > own[0]["train/loss"] * 1.5, "evaluation reports cross-entropy"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": Mean()}, r"loss \(Mean\) returned a tensor of shape \(\)"),
        ({"schedule": nothing}, "schedule gave a learning rate of -1.0 at step 0"),
        ({"optimizer": sgd}, r"optimizer \(SGD\) may keep a state"),
    ],
)
def test_wrong_parts_are_told(arguments: Any, message: str, tmp_path: Path) -> None:
    (said,) = run_ranks(1, fit, overrides(tmp_path, "model.num_layers=1"), arguments)
    assert re.search(message, said), said


class Upwards:
    """Learnable sequences."""

    def __getitem__(self, number: int) -> list[int]:
        return [(7 * number + i) % 128 for i in range(33)]


class StopAfter(megallama.Hook):
    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, state: Any, report: Any) -> None:
        report.numbers["own/number"] = 10.0 * state.step
        if state.step == self.step:
            raise StopTraining


def test_a_run_on_own_data_resumes_exactly(tmp_path: Path) -> None:
    words = [*SMALL, "model.num_layers=2", "checkpoint.interval=2"]
    whole, cut = ([*words, f"train.run_dir={tmp_path / name}"] for name in ("whole", "cut"))
    run_ranks(2, fit, whole, {"data": Upwards(), "hooks": [StopAfter(9)]})
    run_ranks(2, fit, cut, {"data": Upwards(), "hooks": [StopAfter(3)]})
    run_ranks(2, fit, cut, {"data": Upwards()})
    assert [line["own/number"] for line in metrics(tmp_path / "whole")] == [10.0, 20.0, 30.0, 40.0, 50.0]
    wanted, got = (
        [(line["train/loss"], line["train/grad_norm"]) for line in metrics(tmp_path / name)]
        for name in ("whole", "cut")
    )
    assert got == wanted and len(got) == 5


def count(words: list[str]) -> tuple[int, int]:
    """Elements of the parts of all hooks' views, and of the model."""
    counted = []

    class Counts(megallama.Hook):
        def start(self, state: Any, run: megallama.RunView) -> None:
            parts = list(run.parameters())
            counted.append(sum(box.numel() for part in parts for box in part.boxes.values()))

    fit(words, {"hooks": [Counts()]})
    return counted[0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_parameters_are_seen_once_under_every_zero_stage(stage: int, tmp_path: Path) -> None:
    from megallama.model.counts import count_parameters

    words = overrides(tmp_path, "model.num_layers=1", "train.steps=1", f"zero.stage={stage}")
    model = megallama.load_config(words).model
    assert sum(run_ranks(2, count, words)) == count_parameters(model, padded=True)
