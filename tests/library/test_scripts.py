"""The scripts of docs/library.md run as they stand there, and compute on every layout what one process computes."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import SMALL, VOCAB_SIZE, metrics, overrides, run_job, worst_relative
from tests.support.places import ROOT
from tests.support.ranks import run_ranks

MOST_LINES = 30
EXACT = ["precision.dtype=fp64", "model.num_layers=2", "train.steps=3"]
LAYOUTS = {
    "tp2 pp2": (4, ["parallel.tp=2", "parallel.pp=2"]),
    "tp2 sp cp2 zero3": (
        4,
        ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.cp=2", "zero.stage=3"],
    ),
}


def block(words: str) -> str:
    """The block of Python on the page that has these words."""
    text = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    (found,) = [block for block in blocks if words in block]
    return str(found)


def script(name: str) -> str:
    """The script of the page that defines class `name`."""
    return block(f"class {name}")


def run_script(path: Path, words: list[str]) -> None:
    """One rank of a script's run."""
    sys.argv = [str(path), *words]
    runpy.run_path(str(path), run_name="__main__")


def losses(folder: Path, name: str, world_size: int, words: list[str]) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of the script `name`."""
    path = folder / f"{name}.py"
    path.write_text(script(name), encoding="utf-8")
    run_dir = folder / f"{name}-{world_size}-{len(words)}"
    run_ranks(world_size, run_script, path, [*words, f"train.run_dir={run_dir}"])
    return [(line["train/loss"], line["train/grad_norm"]) for line in metrics(run_dir)]


@pytest.mark.parametrize("name", ["ZLoss", "Counting", "NormLog"])
def test_a_script_is_short(name: str) -> None:
    assert len(script(name).splitlines()) <= MOST_LINES


def test_a_loss_over_logits_is_the_same_on_every_layout(tmp_path: Path) -> None:
    words = overrides(tmp_path, *EXACT)
    whole = losses(tmp_path, "ZLoss", 1, words)
    plain = run_job(tmp_path, 1, *EXACT, run_name="plain")
    # Logits are small in the beginning: log Z is the logarithm of the padded vocabulary.
    assert whole[0][0] - plain[0][0] == pytest.approx(1e-2 * math.log(VOCAB_SIZE) ** 2, rel=1e-2)
    for world_size, layout in LAYOUTS.values():
        got = losses(tmp_path, "ZLoss", world_size, [*words, *layout])
        assert max(worst_relative(got, whole)) < 1e-9, layout


def test_a_dataset_is_the_same_on_every_layout(tmp_path: Path) -> None:
    words = [*SMALL, *EXACT]
    whole = losses(tmp_path, "Counting", 1, words)
    assert len(whole) == 3
    for world_size, layout in LAYOUTS.values():
        got = losses(tmp_path, "Counting", world_size, [*words, *layout])
        assert max(worst_relative(got, whole)) < 1e-9, layout


def test_a_hook_sees_every_parameter_on_every_layout(tmp_path: Path) -> None:
    words = overrides(tmp_path, *EXACT)
    written = []
    for world_size, layout in [(1, []), *LAYOUTS.values()]:
        losses(tmp_path, "NormLog", world_size, [*words, *layout])
        file = tmp_path / f"NormLog-{world_size}-{len(words) + len(layout)}" / "norms.jsonl"
        written.append([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])
    whole, *others = written
    assert [line["step"] for line in whole] == [1, 2, 3]
    assert "embedding.word_embeddings.weight" in whole[0]["norms"]
    for other in others:
        for line, wanted in zip(other, whole, strict=True):
            assert line["norms"] == pytest.approx(wanted["norms"], rel=1e-9)


def run_parts(words: list[str]) -> tuple[float, int]:
    """The blocks of the page that are no scripts: a run with schedule and optimizer, then a step made of parts."""
    import megallama

    names: dict[str, Any] = {"megallama": megallama, "config": megallama.load_config(words)}
    for text in ("def schedule", "def resume"):
        exec(block(text), names)
    run = {"schedule": names["schedule"], "optimizer": names["optimizer"]}
    assert megallama.Trainer.from_config(names["config"], **run).fit()
    names["path"] = Path(names["config"].train.run_dir) / "checkpoints" / "step-00000003"
    exec(block("megallama.build_model(") + "    step = resume(engine, config, path)\n", names)
    return names["result"].loss, names["step"]


def test_the_other_blocks_run(tmp_path: Path) -> None:
    words = overrides(tmp_path, *EXACT)
    for loss, step in run_ranks(2, run_parts, [*words, "parallel.pp=2"]):
        lines = metrics(tmp_path / "run")
        assert step == 3
        assert loss == pytest.approx(lines[0]["train/loss"], rel=1e-12), (
            "a step made of parts is that of a run"
        )
        assert [line["train/lr"] for line in lines] == pytest.approx([3e-6, 6e-6, 9e-6])
