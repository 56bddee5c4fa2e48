"""`megallama train`: ranks through torchrun's API, one message for a mistake, signals that reach the ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megallama.config.load import load_yaml
from megallama.host.errors import EXIT_USER_ERROR
from tests.launch.conftest import Workplace
from tests.launch.entry import ROOT, megallama_command, run_command, unchanged
from tests.support.jobs import metrics

RANKS = ["--nproc-per-node=2"]


@contextmanager
def started(arguments: list[str], *, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """`megallama train` in a process of its own, everything that it and its ranks say in `stdout`."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "megallama.cli", "train", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def train(arguments: list[str], *, folder: Path) -> tuple[int, str]:
    """Exit code and what was said."""
    with started(arguments, folder=folder) as process:
        output = process.communicate(timeout=1800)[0]
        return process.returncode, output


def test_several_runs_on_two_ranks(workplace: Workplace) -> None:
    """Words between options, several values, a folder of one's own."""
    (workplace.folder / "conf" / "model").mkdir(parents=True)
    shape = (ROOT / "conf" / "model" / "llama_tiny.yaml").read_text(encoding="utf-8")
    (workplace.folder / "conf" / "model" / "mine.yaml").write_text(shape.replace("llama_tiny", "mine"))
    first, *rest = workplace.arguments
    assert first == "model=llama_tiny"
    words = ["model=mine", *RANKS, *rest, "--multirun", "optim.lr=1e-3,2e-3", "-cd", "conf", "parallel.tp=2"]
    code, said = train(words, folder=workplace.folder)
    assert code == 0, said
    for index, rate in enumerate((1e-3, 2e-3)):
        folder = workplace.run_dir / str(index)
        config = load_yaml(folder / "config.yaml")
        assert (config.model.name, config.optim.lr, len(metrics(folder))) == ("mine", rate, 4)
        assert sorted(path.name for path in (folder / "log").iterdir()) == [
            "rank-00000.log",
            "rank-00001.log",
        ]
    assert "torchrun" not in said and "OMP_NUM_THREADS" not in said, said


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([*RANKS, "parallel.tp=4"], "world_size (2) must be a multiple of"),
        ([*RANKS, "data.sources=[absent]"], "absent does not exist"),
        ([*RANKS, "--nnodes=3", "parallel.tp=4"], "world_size (6) must be a multiple of"),
        (["--config-dir=absent"], "--config-dir (absent) is not a folder"),
    ],
)
def test_a_mistake_is_told_before_any_rank_starts(
    extra: list[str], message: str, workplace: Workplace
) -> None:
    arguments = ["train", *workplace.arguments, *extra]
    with unchanged(workplace.folder):
        outcome = run_command(megallama_command, arguments, folder=workplace.folder)
    assert outcome.code == EXIT_USER_ERROR, outcome.output
    assert message in outcome.message and "\n" not in outcome.message, outcome.output


@pytest.mark.parametrize("nodes", ["0", "2:1", "two", "1:2:3"])
def test_nodes_that_are_none(nodes: str, workplace: Workplace) -> None:
    outcome = run_command(megallama_command, ["train", "--nnodes", nodes], folder=workplace.folder)
    assert outcome.code == EXIT_USER_ERROR and f"--nnodes: {nodes} must be a number" in outcome.output


@pytest.mark.parametrize(
    "options",
    [
        ["--rdzv-backend=c10d", "--rdzv-conf=is_host=0,read_timeout=2"],
        ["--rdzv-backend=static", "--node-rank=1", "--rdzv-conf=timeout=2"],
    ],
)
def test_nodes_that_cannot_meet(options: list[str], workplace: Workplace) -> None:
    words = [*workplace.arguments, *RANKS, "--nnodes=2", "--rdzv-endpoint=127.0.0.1:1", *options]
    code, said = train(words, folder=workplace.folder)
    assert code == EXIT_USER_ERROR, said
    assert said.startswith("error: the nodes cannot meet (--nnodes=2 ") and said.count("\n") == 1, said


def test_a_mistake_that_only_the_ranks_can_see(workplace: Workplace) -> None:
    """One message, and no report."""
    code, said = train(
        [*workplace.arguments, *RANKS, "train.run_dir=/proc/megallama/run"], folder=workplace.folder
    )
    assert code == EXIT_USER_ERROR, said
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and errors[0].startswith("error: train.run_dir (/proc/megallama/run)"), said
    assert "Traceback" not in said and "exitcode" not in said and "elastic" not in said, said


def test_a_start_under_another_launcher(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    from megallama.host.errors import UserError
    from megallama.host.torchrun import refuse_other_launcher

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(UserError, match="start it without torchrun"):
        refuse_other_launcher(is_one_node=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    refuse_other_launcher(is_one_node=False)
    with pytest.raises(UserError, match="srun started 2 copies"):
        refuse_other_launcher(is_one_node=True)
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"WORLD_SIZE \(2\) says that this process is one"):
        refuse_other_launcher(is_one_node=True)


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the metrics have a line of `step`."""
    for _ in range(3000):
        if (run_dir / "metrics.jsonl").exists() and len(metrics(run_dir)) >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not reached")


@pytest.mark.timeout(600)
@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_ranks_save(number: signal.Signals, workplace: Workplace) -> None:
    words = [
        *workplace.arguments,
        *RANKS,
        "train.steps=5000",
        "checkpoint.interval=0",
        "optim.warmup_steps=1",
    ]
    with started(words, folder=workplace.folder) as process:
        wait_for_step(workplace.run_dir, 3, process)
        process.send_signal(number)
        said = process.communicate(timeout=300)[0]
    assert process.returncode == 128 + number, said
    assert "asked to stop" in said and said.rstrip().endswith(f"ended by {number.name}"), said
    assert "Traceback" not in said, said
    assert len(list((workplace.run_dir / "checkpoints").iterdir())) == 1
