"""`log.samples`: one line a step, the same for every layout, continued by a resumed run, and equal to `data trace`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megallama.host.errors import UserError
from megallama.stream.trace import trace_step
from megallama.trainer.hooks.base import Hook, StepReport
from megallama.trainer.hooks.samples import SamplesHook
from megallama.trainer.state import TrainState
from tests.support.jobs import overrides, run_job, train, write_dataset
from tests.support.ranks import run_ranks


def lines(run_dir: Path) -> list[dict[str, Any]]:
    text = (run_dir / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def settings(folder: Path) -> list[str]:
    """Two sources, of which the smaller one comes to its second epoch within the run."""
    write_dataset(folder / "数据" / "小", documents=6, seed=1)
    write_dataset(folder / "数据" / "大", documents=60, seed=2)
    sources = f"data.sources=[{{path: {folder}/数据/大, weight: 2}}, {{path: {folder}/数据/小}}]"
    checkpoints = ["checkpoint.interval=3", "checkpoint.async_save=false"]
    return [sources, "log.samples=true", "model.num_layers=2", *checkpoints]


def train_and_vanish(arguments: list[str]) -> None:
    """Train, and vanish without a word within step 5, when the newest checkpoint is that of step 3."""

    class Vanish(Hook):
        def after_step(self, state: TrainState, report: StepReport) -> None:
            if state.step == 5:
                os._exit(9)

    train(arguments, hooks=[Vanish()])


def test_ids_are_logged_resumed_and_what_trace_says(tmp_path: Path) -> None:
    extra = settings(tmp_path)
    run_job(tmp_path, 1, *extra, run_name="whole")
    whole = lines(tmp_path / "whole")
    assert [line["progress/step"] for line in whole] == [1, 2, 3, 4, 5]
    with pytest.raises(AssertionError):
        run_ranks(1, train_and_vanish, overrides(tmp_path, *extra, run_name="cut"))
    assert [line["progress/step"] for line in lines(tmp_path / "cut")] == [1, 2, 3, 4]
    # The last line of a run that dies may be half a line.
    with open(tmp_path / "cut" / "samples.jsonl", "a", encoding="utf-8") as stream:
        stream.write('{"progress/step": 5, "first')
    run_job(tmp_path, 2, *extra, "parallel.pp=2", run_name="cut")
    assert lines(tmp_path / "cut") == whole, "resumed at step 3, under another layout"
    epochs = set()
    for line in whole:
        traced = list(trace_step(tmp_path / "whole", step=line["progress/step"]))
        assert [(line["sources"][source], *rest) for source, *rest in line["samples"]] == [
            (sequence.source, sequence.epoch, sequence.place) for sequence in traced
        ]
        assert [line["first_sample"] + row for row in range(8)] == [sequence.sample for sequence in traced]
        epochs |= {(source, epoch) for source, epoch, _ in line["samples"]}
    assert len(epochs) > 2, "the smaller source must come to its second epoch"


def test_nothing_is_written_unless_asked(tmp_path: Path) -> None:
    run_job(tmp_path, 1, "train.steps=1", "model.num_layers=1")
    assert (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "samples.jsonl").exists()


@pytest.mark.parametrize("content", ["[]\n", '{"step": 1}\n', "无\n"])
def test_a_file_of_something_else_is_not_continued(tmp_path: Path, content: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"samples.jsonl cannot be continued .*: move it away"):
        SamplesHook(path, lambda step: {}, completed_steps=0)
    assert path.read_text(encoding="utf-8") == content
