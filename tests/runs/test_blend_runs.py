"""Blends through the real entry: a killed run, resumed under another layout and mix, takes what one process takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs.test_resume import train_three_of_five
from tests.support.jobs import metrics, overrides, run_job, train, worst_relative, write_prepared
from tests.support.ranks import run_ranks

STEPS = 7


def lines(run_dir: Path) -> list[dict[str, Any]]:
    text = (run_dir / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def settings(folder: Path) -> list[str]:
    """Three sources of which one, 小, comes to the end of its epochs within the second step."""
    for number, (name, documents) in enumerate({"大": 60, "小": 6, "新": 50}.items()):
        write_prepared(folder / "数据" / name, documents=documents, seed=number)
    small = f"{{path: {folder}/数据/小, weight: 2, max_epochs: 1.25}}"
    return [
        f"data.sources=[{{path: {folder}/数据/大, weight: 1}}, {small}]",
        "data.packing=cut",
        "data.loss_on_eod=false",
        "log.samples=true",
        "model.num_layers=2",
        "checkpoint.interval=3",
        f"train.steps={STEPS}",
    ]


def schedule(folder: Path, *entries: tuple[int, dict[str, float]]) -> str:
    mixes = [
        f"{{from_step: {step}, sources: "
        f"[{', '.join(f'{{path: {folder}/数据/{name}, weight: {weight}}}' for name, weight in weights.items())}]}}"
        for step, weights in entries
    ]
    return f"data.schedule=[{', '.join(mixes)}]"


def test_a_killed_run_goes_on_under_another_layout_and_mix_as_one_process_does(tmp_path: Path) -> None:
    extra = settings(tmp_path)
    first, second = (2, {"大": 3.0, "新": 1.0}), (5, {"新": 0.7, "小": 0.3})
    plan = schedule(tmp_path, first, second)
    wanted = run_job(tmp_path, 1, *extra, plan, run_name="whole")
    with pytest.raises(AssertionError, match="exit code 9|without a result"):
        before = overrides(tmp_path, *extra, schedule(tmp_path, first), run_name="cut")
        run_ranks(2, train_three_of_five, before)
    assert metrics(tmp_path / "cut")[-1]["progress/step"] in (3, 4)
    run_ranks(2, train, overrides(tmp_path, *extra, plan, "parallel.pp=2", run_name="cut"))
    assert "resumed from" in (tmp_path / "cut" / "log" / "rank-00000.log").read_text()
    whole = lines(tmp_path / "whole")
    assert lines(tmp_path / "cut") == whole
    assert [line["progress/step"] for line in whole] == list(range(1, STEPS + 1))
    got = [(line["train/loss"], line["train/grad_norm"]) for line in metrics(tmp_path / "cut")]
    assert max(worst_relative(got, wanted)) < 1e-6
    names = [[Path(line["sources"][number]).name for number, _, _ in line["samples"]] for line in whole]
    taken = [{name: step.count(name) for name in ("大", "小", "新")} for step in names]
    assert taken[0]["小"] == 5 and taken[1]["小"] < 5, "of 1.25 epochs the first step took the most"
    assert [step["新"] > 0 for step in taken] == [False, False, True, True, True, True, True]
    assert taken[2]["小"] == taken[4]["小"] == 0 and taken[5]["小"] > 0, "it returns"
