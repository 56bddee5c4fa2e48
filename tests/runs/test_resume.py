"""A run that is cut off and started again is the run that was never cut off, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megallama.trainer.hooks.base import Hook, StopTraining
from tests.support.gates import gated
from tests.support.jobs import metrics, overrides, run_job, train
from tests.support.places import ROOT
from tests.support.ranks import run_ranks

LAYOUTS = {
    "one rank": (1, []),
    "dp2 zero0": (2, ["zero.stage=0"]),
    "dp2 zero1 bf16": (2, ["zero.stage=1", "precision.dtype=bf16"]),
    "dp2 zero3": (2, ["zero.stage=3"]),
    "pp2 zero2 bf16": (2, ["parallel.pp=2", "zero.stage=2", "precision.dtype=bf16"]),
    "dp2 zero2 offload bf16": (2, ["zero.stage=2", "zero.offload=true", "precision.dtype=bf16"]),
    "pp2 vp2 tied zero1": (2, ["parallel.pp=2", "parallel.vp=2", "model.tie_embeddings=true"]),
    "pp2 vp2 tied zero3 bf16": (
        2,
        [
            "parallel.pp=2",
            "parallel.vp=2",
            "model.tie_embeddings=true",
            "zero.stage=3",
            "precision.dtype=bf16",
        ],
    ),
    "tp2 sp fp16 with dropout": (
        2,
        [
            "parallel.tp=2",
            "parallel.sequence_parallel=true",
            "precision.dtype=fp16",
            "model.hidden_dropout=0.1",
        ],
    ),
}


def train_three_of_five(arguments):
    """Train with the settings of the whole run, and vanish without a word when the checkpoint of step 3 is there."""
    run_dir = next(word.partition("=")[2] for word in arguments if word.startswith("train.run_dir="))

    class Vanish(Hook):
        def after_step(self, state, report):
            if state.step == 4:
                while not (Path(run_dir) / "checkpoints" / "step-00000003").exists():
                    time.sleep(0.01)
                os._exit(9)

    train(arguments, hooks=[Vanish()])


IN_GATE = {"one rank", "dp2 zero2 offload bf16", "pp2 vp2 tied zero3 bf16", "tp2 sp fp16 with dropout"}


@pytest.mark.parametrize("name", gated(LAYOUTS, gate=IN_GATE))
def test_resumed_run_equals_the_uninterrupted_one_bitwise(name, tmp_path):
    world_size, extra = LAYOUTS[name]
    wanted = run_job(tmp_path, world_size, *extra, run_name="whole")
    arguments = overrides(tmp_path, *extra, "checkpoint.interval=3", run_name="cut")
    with pytest.raises(AssertionError, match="exit code 9|without a result"):
        run_ranks(world_size, train_three_of_five, arguments)
    assert [line["progress/step"] for line in metrics(tmp_path / "cut")] in ([1, 2, 3], [1, 2, 3, 4])
    run_ranks(world_size, train, arguments)
    lines = metrics(tmp_path / "cut")
    assert [line["progress/step"] for line in lines] == [1, 2, 3, 4, 5], "each step once"
    assert [(line["train/loss"], line["train/grad_norm"]) for line in lines] == wanted
    assert "resumed from" in (tmp_path / "cut" / "log" / "rank-00000.log").read_text()


def test_a_checkpoint_loads_into_another_layout(tmp_path):
    wanted = run_job(tmp_path, 1, run_name="whole")
    arguments = overrides(tmp_path, "checkpoint.interval=3", run_name="cut")
    layouts = [(4, ["parallel.tp=2", "parallel.pp=2"]), (2, ["zero.stage=3"])]
    with pytest.raises(AssertionError, match="exit code 9|without a result"):
        run_ranks(layouts[0][0], train_three_of_five, [*arguments, *layouts[0][1]])
    run_ranks(layouts[1][0], train, [*arguments, *layouts[1][1]])
    got = [(line["train/loss"], line["train/grad_norm"]) for line in metrics(tmp_path / "cut")]
    for (loss, norm), (wanted_loss, wanted_norm) in zip(got, wanted, strict=True):
        assert abs(loss - wanted_loss) <= 1e-6 * wanted_loss and abs(norm - wanted_norm) <= 1e-6 * wanted_norm


def torchrun(arguments, *, world_size=2):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world_size}"]
    command += ["--standalone", str(ROOT / "launch" / "train.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_step(run_dir, step, process):
    for _ in range(1200):
        if (run_dir / "metrics.jsonl").exists() and len(metrics(run_dir)) >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not reached")


def kill_all(process):
    """kill -9 of launcher and ranks (torchrun's ranks outlive it, in sessions of their own)."""
    victims = [process, *psutil.Process(process.pid).children(recursive=True)]
    for victim in victims:
        victim.kill()
    process.communicate()


@pytest.mark.long
def test_kill_nine_and_the_same_command_again(tmp_path):
    arguments = overrides(tmp_path, "train.steps=200", "checkpoint.interval=2", run_name="killed")
    process = torchrun(arguments)
    wait_for_step(tmp_path / "killed", 7, process)
    kill_all(process)
    reached = len(metrics(tmp_path / "killed"))
    whole = overrides(tmp_path, "train.steps=200", f"checkpoint.interval={reached + 3}", run_name="whole")
    run_ranks(2, train_until, whole, reached + 3)
    again = torchrun(arguments)
    wait_for_step(tmp_path / "killed", reached + 3, again)
    kill_all(again)
    got = [line["train/loss"] for line in metrics(tmp_path / "killed")][: reached + 3]
    assert got == [line["train/loss"] for line in metrics(tmp_path / "whole")][: reached + 3]


def train_until(arguments, step):
    """Train up to `step` of a longer run, then end; the step after it is not recorded."""

    class Stop(Hook):
        def after_step(self, state, report):
            if state.step > step:
                raise StopTraining

    train(arguments, hooks=[Stop()])


@pytest.mark.long
def test_sigterm_saves_and_ends_cleanly(tmp_path):
    arguments = overrides(tmp_path, "train.steps=500", run_name="asked")
    process = torchrun(arguments)
    wait_for_step(tmp_path / "asked", 3, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=1800)[0]
    assert "asked to stop" in output
    saved = [path.name for path in (tmp_path / "asked" / "checkpoints").iterdir()]
    assert len(saved) == 1 and saved[0].startswith("step-"), (saved, output)


def test_two_runs_cannot_share_a_folder(tmp_path):
    from megallama.host.errors import UserError
    from megallama.trainer.run_folder import RunFolder

    with (
        RunFolder(tmp_path).lock(),
        pytest.raises(UserError, match=f"in use by another run .process {os.getpid()} on"),
    ):
        RunFolder(tmp_path).lock()
    RunFolder(tmp_path).lock().close()
