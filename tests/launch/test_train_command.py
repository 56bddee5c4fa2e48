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


@pytest.mark.long
@pytest.mark.timeout(600)
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
        ["--rdzv-backend=static", "--node-rank=1", "--rdzv-conf=timeout=2"],
        pytest.param(["--rdzv-backend=c10d", "--rdzv-conf=is_host=0,read_timeout=2"], marks=pytest.mark.long),
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
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")


POD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
"""What Kubeflow's operator sets in a pod, of which each is to start its own ranks."""


def test_a_pod_of_several(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """WORLD_SIZE counts pods: the message says what to give, and torchrun is named only to who used it."""
    from megallama.cli import main
    from megallama.host.errors import UserError
    from megallama.host.launch import read_launch_environment, refuse_several
    from megallama.host.torchrun import preset, refuse_other_launcher

    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_RANK", *POD):
        monkeypatch.delenv(name, raising=False)
    for name, value in POD.items():
        monkeypatch.setenv(name, value)
    wanted = "--nnodes=2 --node-rank=1 --rdzv-backend=static --rdzv-endpoint=job-master-0:23456"
    with pytest.raises(
        UserError, match=f"WORLD_SIZE \\(2\\) says that this machine is one of several.*{wanted}"
    ):
        refuse_other_launcher(is_one_node=True)
    refuse_other_launcher(is_one_node=False)
    refuse_several("megallama generate")  # one process wherever it runs
    monkeypatch.delenv("RANK")
    with pytest.raises(UserError, match="--node-rank=<number of this machine, from 0>"):
        refuse_other_launcher(is_one_node=True)
    with pytest.raises(
        UserError, match=r"RANK is not set though WORLD_SIZE \(2\) is.*or unset RANK and WORLD_SIZE"
    ):
        read_launch_environment()
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_other_launcher(is_one_node=True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    refuse_several("megallama generate")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun started 2: start it without torchrun"):
        refuse_several("megallama generate")
    # torchrun's own variables are options here as there.
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    for name, value in {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "auto", "PET_RDZV_ENDPOINT": "a:1"}.items():
        monkeypatch.setenv(name, value)
    started: list[tuple[tuple[str, ...], int]] = []

    def start(module: str, words: list[str], *, options: tuple[str, ...], ranks_per_node: int) -> int:
        started.append((options, ranks_per_node))
        return 0

    monkeypatch.setattr("megallama.host.torchrun.start_ranks", start)
    monkeypatch.chdir(workplace.folder)
    assert preset("nproc_per_node") is None
    assert main(["train", *workplace.arguments]) == 0
    assert started == [(("--nnodes=2", "--rdzv-endpoint=a:1"), 1)]


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
