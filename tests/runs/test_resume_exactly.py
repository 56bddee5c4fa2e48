"""What a run does after a resume, in another layout or with another batch size, is what it would have done without."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megallama.batches.loader import Loader
from megallama.config.load import load_config
from megallama.topology.groups import Topology
from tests.support.jobs import metrics, overrides, train_config
from tests.support.ranks import run_ranks

FP16 = ["precision.dtype=fp16", "precision.loss_scale_window=2", "precision.initial_loss_scale=1024"]
SCHEDULE = ["train.steps=6", "optim.warmup_steps=2", "checkpoint.interval=3"]
SAME = (
    "train/lr",
    "train/loss_scale",
    "progress/step",
    "progress/consumed_samples",
    "progress/consumed_tokens",
)


def train_and_note(arguments: list[str], notes: Path) -> None:
    """One rank of a run that writes the tokens of each of its steps to `notes`, if it is one that reads them."""
    from tests.support.builders import loader_of

    config = load_config(arguments)

    def noting_loader(topology: Topology) -> Loader:
        loader = loader_of(config, topology)
        read = loader.batches

        def batches(step: int) -> Any:
            given = read(step)
            if topology.is_first_stage and topology.tp_rank == 0:
                rows = [row for batch in given for row in batch.tokens_BS.tolist()]
                (notes / f"{step}-{topology.dp_rank}.json").write_text(json.dumps(rows), encoding="utf-8")
            return given

        loader.batches = batches  # type: ignore[method-assign]
        return loader

    without_sources = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=[]))
    train_config(without_sources, data=noting_loader)


def run_and_note(folder: Path, world_size: int, *words: str, run_name: str) -> dict[int, list[list[int]]]:
    """Step -> the token sequences of its global batch in order."""
    notes = folder / f"{run_name}-notes"
    notes.mkdir()
    run_ranks(
        world_size, train_and_note, overrides(folder, *FP16, *SCHEDULE, *words, run_name=run_name), notes
    )
    steps: dict[int, list[list[int]]] = {}
    for file in sorted(notes.iterdir(), key=lambda file: [int(part) for part in file.stem.split("-")]):
        steps.setdefault(int(file.stem.partition("-")[0]), []).extend(json.loads(file.read_text()))
    return steps


Cut = Callable[..., tuple[dict[int, list[list[int]]], list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[list[int]]]]:
    """An uninterrupted run on one rank, with checkpoints at steps 3 and 6, and the sequences of each step."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_and_note(folder, 1, run_name="whole")


@pytest.fixture
def resumed(whole: tuple[Path, dict[int, list[list[int]]]], tmp_path: Path) -> Cut:
    """Resumes a copy of that run from step 3: sequences and metrics."""

    def resume(world_size: int, *words: str) -> tuple[dict[int, list[list[int]]], list[dict[str, Any]]]:
        shutil.copytree(whole[0] / "whole", tmp_path / "cut")
        shutil.copytree(whole[0] / "data", tmp_path / "data")
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000006")
        steps = run_and_note(tmp_path, world_size, *words, run_name="cut")
        return steps, metrics(tmp_path / "cut")

    return resume


LAYOUTS = {
    "one rank, micro-batch of 4": (1, ["train.micro_batch_size=4"]),
    "dp2 zero2, micro-batch of 2": (2, ["zero.stage=2", "train.micro_batch_size=2"]),
    "dp2 tp2 zero1": (4, ["parallel.tp=2"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_samples_schedule_and_counters_go_on(name: str, whole: Any, resumed: Cut) -> None:
    folder, wanted = whole
    world_size, words = LAYOUTS[name]
    steps, lines = resumed(world_size, *words)
    assert sorted(steps) == [3, 4, 5]
    assert all(steps[step] == wanted[step] for step in steps)
    wanted_lines = metrics(folder / "whole")
    assert [[line[key] for key in SAME] for line in lines] == [
        [line[key] for key in SAME] for line in wanted_lines
    ]
    assert lines[:3] == wanted_lines[:3], "steps before the checkpoint are kept, later ones were cut"
    assert (
        len({line["train/loss_scale"] for line in lines}) > 2
        and len({line["train/lr"] for line in lines}) > 4
    )
    for line, other in zip(lines, wanted_lines, strict=True):
        assert abs(line["train/loss"] - other["train/loss"]) < 1e-3


@pytest.mark.parametrize("size", [4, 16])
def test_another_batch_size_goes_on_from_the_consumed_samples(size: int, whole: Any, resumed: Cut) -> None:
    _, wanted = whole
    in_order = [row for step in sorted(wanted) for row in wanted[step]]
    steps, lines = resumed(2, f"train.global_batch_size={size}")
    rows = [row for step in sorted(steps) for row in steps[step]]
    assert len(rows) == 3 * size
    expected = in_order[24 : 24 + 3 * size]
    assert rows[: len(expected)] == expected
    assert [line["progress/consumed_samples"] for line in lines] == [
        8,
        16,
        24,
        *(24 + n * size for n in (1, 2, 3)),
    ]
    assert [line["progress/consumed_tokens"] for line in lines][3:] == [
        32 * (24 + n * size) for n in (1, 2, 3)
    ]
