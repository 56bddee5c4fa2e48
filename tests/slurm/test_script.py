"""slurm/pretrain_7b.sh with stand-ins for the commands it calls; the real ones are in test_cluster.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "slurm" / "pretrain_7b.sh"

JOB = {
    "SLURM_JOB_ID": "54321",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_CPUS_ON_NODE": "64",
}
RECORD = (
    'printf "%s\\n" "$(basename "$0")" "$@"'
    ' "OMP=${OMP_NUM_THREADS:-} STOP=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-}" >> "$CALLS"\n'
)
STAND_INS = {
    "megallama": RECORD + 'exit "${CHECK_EXIT:-0}"\n',
    "scontrol": "printf 'gpu07\\ngpu08\\n'\n",
    # What srun does on the second node.
    "srun": 'while [[ "$1" == --* ]]; do shift; done\nSLURM_NODEID=1 SLURMD_NODENAME=gpu08 exec "$@"\n',
    "torchrun": RECORD + 'exit "${TRAIN_EXIT:-0}"\n',
}


def submit(
    folder: Path, *arguments: str, environment: dict[str, str | None] | None = None
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Run a copy of the script as sbatch does, from a spool folder; returns also the words of each call."""
    root, spool = folder / "仓库 repo", folder / "spool"
    for path in (root / "launch" / "train.py", root / ".venv" / "bin" / "python", spool / "slurm_script"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    shutil.copy(SCRIPT, spool / "slurm_script")
    for name, body in STAND_INS.items():
        program = root / ".venv" / "bin" / name
        program.write_text("#!/usr/bin/env bash\n" + body, encoding="utf-8")
        program.chmod(0o755)
    calls = folder / "calls"
    calls.touch()
    wanted: dict[str, str | None] = {**JOB, "SLURM_SUBMIT_DIR": str(root), **(environment or {})}
    outer = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMP_", "NPROC_"))
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    done = subprocess.run(
        ["bash", str(spool / "slurm_script"), *arguments],
        env={**outer, **given, "CALLS": str(calls)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    recorded: list[list[str]] = []
    for line in calls.read_text(encoding="utf-8").splitlines():
        if line in STAND_INS:
            recorded.append([])
        recorded[-1].append(line)
    return done, recorded


def test_shellcheck_finds_nothing() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_each_node_starts_torchrun_with_the_words_of_the_command_line(tmp_path: Path) -> None:
    words = ["data.sources=[{path: /语料/a b}]", "train.run_dir=$HOME/'x'", "optim.lr=1e-4"]
    done, (check, torchrun) = submit(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert check[:-1] == ["megallama", "check", "--world-size", "8", "+exp=llama2_7b", *words]
    script = str(tmp_path / "仓库 repo" / "launch" / "train.py")
    at = torchrun.index(script)
    assert torchrun[at + 1 : -1] == ["+exp=llama2_7b", *words]
    assert torchrun[1:at] == [
        "--nnodes=2",
        "--nproc-per-node=4",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=gpu07:24321",
        "--rdzv-id=54321",
        "--rdzv-conf=is_host=0",
        "--local-addr=gpu08",
    ]
    assert torchrun[-1] == "OMP=16 STOP=110"


@pytest.mark.parametrize("word", ["+exp=llama3_8b", "exp=demo", "++exp=demo"])
def test_another_run_replaces_the_default(tmp_path: Path, word: str) -> None:
    _, (check, torchrun) = submit(tmp_path, "train.steps=3", word)
    assert check[-3:-1] == torchrun[-3:-1] == ["train.steps=3", word]
    assert "+exp=llama2_7b" not in check + torchrun


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, "4"),
        ({"SLURM_GPUS_PER_NODE": "2"}, "2"),
        ({"SLURM_GPUS_PER_NODE": "h100:8"}, "8"),
        ({"SLURM_GPUS_ON_NODE": None, "NPROC_PER_NODE": "3"}, "3"),
        ({"SLURM_GPUS_PER_NODE": "0", "NPROC_PER_NODE": "3"}, "3"),
    ],
)
def test_ranks_a_node(tmp_path: Path, environment: dict[str, str | None], ranks: str) -> None:
    _, (check, torchrun) = submit(tmp_path, environment=environment)
    assert f"--nproc-per-node={ranks}" in torchrun
    assert check[3] == str(2 * int(ranks))


def test_failed_check_costs_nothing(tmp_path: Path) -> None:
    done, calls = submit(tmp_path, environment={"CHECK_EXIT": "2"})
    assert done.returncode == 2
    assert [call[0] for call in calls] == ["megallama"]


def test_exit_code_of_training_is_the_job_s(tmp_path: Path) -> None:
    done, _ = submit(tmp_path, environment={"TRAIN_EXIT": "7"})
    assert done.returncode == 7


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_GPUS_ON_NODE": None}, "ask for GPUs with --gpus-per-node=N, or set NPROC_PER_NODE"),
        ({"SLURM_GPUS_PER_NODE": "0"}, "number of ranks a node is unknown (0)"),
        ({"NPROC_PER_NODE": "two"}, "number of ranks a node is unknown (two)"),
        ({"SLURM_SUBMIT_DIR": "/"}, "no launch/train.py in SLURM_SUBMIT_DIR (/): submit from the repository"),
        ({"SLURM_JOB_ID": None}, "not inside a Slurm job: submit it with sbatch"),
    ],
)
def test_refusals_say_what_to_change(
    tmp_path: Path, environment: dict[str, str | None], message: str
) -> None:
    done, calls = submit(tmp_path, environment=environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert not calls
