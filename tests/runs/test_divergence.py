"""A run that diverges ends with one message, and its good checkpoints stay."""

from __future__ import annotations

import math
from pathlib import Path

from megallama.checkpoint.format.integrity import verify_checkpoint
from megallama.checkpoint.format.protocol import find_checkpoints, step_name
from megallama.metrics.jsonl import load_metrics
from megallama.trainer.hooks.base import Hook, RunView, StepReport
from megallama.trainer.state import TrainState
from tests.support.jobs import overrides, train
from tests.support.ranks import run_ranks


def ends_of(lives: list[list[str]]) -> list[str]:
    """Several lives of a run in this rank: the messages with which they end."""
    from megallama.host.errors import UserError

    ends = []
    for arguments in lives:
        try:
            train(arguments)
            ends.append("")
        except UserError as error:
            ends.append(str(error))
    return ends


def test_good_checkpoints_outlive_a_run_that_diverges_in_fp16(tmp_path: Path) -> None:
    """Its loss is NaN in a step that fp16 skips: nothing is saved from there on, and nothing removed."""
    words = ["checkpoint.interval=1", "checkpoint.keep=2", "precision.dtype=fp16", "train.steps=3"]
    good = overrides(tmp_path, *words, run_name="run")
    diverging = [*good, "train.steps=40", "optim.lr=1e4", "optim.clip=0", "optim.schedule=constant"]
    ((first, second),) = run_ranks(1, ends_of, [good, diverging])
    assert (first, second.partition(":")[0]) == ("", "step 5 diverged (loss nan, gradient norm inf)")
    rows = load_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["train/skipped"] == 1 and math.isnan(rows[-1]["train/loss"])
    folder = tmp_path / "run" / "checkpoints"
    assert find_checkpoints(folder) == [3, 4]
    assert verify_checkpoint(folder / step_name(3)) == []


def test_weights_that_are_not_finite_are_neither_saved_nor_taken(tmp_path: Path) -> None:
    words = ["checkpoint.interval=1", "checkpoint.keep=1", "train.steps=2"]
    arguments = overrides(tmp_path, *words, run_name="run")
    ((saved, resumed, begun),) = run_ranks(1, ends_with_infinite_weights, arguments)
    assert saved.startswith("step 2 diverged (fp32/") and " holds inf): it is not saved" in saved, saved
    folder = tmp_path / "run" / "checkpoints"
    # What a version without that check left behind.
    assert find_checkpoints(folder) == [2]
    wanted = f"{folder / step_name(2)} cannot be trained on in fp32 (fp32/"
    assert resumed.startswith(wanted) and "move " in resumed, resumed
    assert begun.startswith(wanted) and begun.endswith("choose another train.init_from"), begun


def ends_with_infinite_weights(arguments: list[str]) -> list[str]:
    """A run in whose step 2 weights become infinite; the same without the check; what may follow on that."""
    from megallama.host.errors import UserError
    from megallama.trainer import build

    class Spoil(Hook):
        def start(self, state: TrainState, run: RunView) -> None:
            self.run = run

        def after_step(self, state: TrainState, report: StepReport) -> None:
            if state.step == 2:
                next(iter(next(self.run.parameters()).boxes.values())).fill_(math.inf)

    try:
        train(arguments, hooks=[Spoil()])
        raise AssertionError("it was saved")
    except UserError as error:
        saved = str(error)
    assert find_checkpoints(Path(arguments_folder(arguments)) / "checkpoints") == [1]
    build.not_finite = lambda *args, **kwargs: None  # type: ignore[assignment]
    train(arguments, hooks=[Spoil()])
    other = f"{arguments_folder(arguments)}-other"
    return [
        saved,
        *ends_of(
            [
                arguments,
                [*arguments, f"train.run_dir={other}", f"train.init_from={arguments_folder(arguments)}"],
            ]
        ),
    ]


def arguments_folder(arguments: list[str]) -> str:
    """The run folder that `arguments` name."""
    (folder,) = [
        word.removeprefix("train.run_dir=") for word in arguments if word.startswith("train.run_dir=")
    ]
    return folder
