"""slurm/pretrain_7b.sh on a real Slurm of two nodes, training for real."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import NODES, Cluster, missing_packages, two_nodes
from tests.support.jobs import metrics, overrides, run_job, worst_relative

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 110.0
BARE = ["data.validation=[]", "data.tokenizer=null", "optim.schedule=constant", "optim.warmup_steps=0"]
"""What of +exp=demo would not fit the small run of `tests.support.jobs`."""

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        bool(missing_packages()),
        reason=f"Slurm is not installed ({', '.join(missing_packages())} missing): run make slurm, as root",
    ),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes, shared by the tests of this file."""
    with two_nodes() as cluster:
        yield cluster


def submit(cluster: Cluster, folder: Path, *arguments: str) -> tuple[int, str]:
    """`sbatch --wait` with one of the two GPUs of each node; the exit code and the job's output."""
    output = folder / "job.log"
    options = ["--wait", "--nodes=2", "--gpus-per-node=1", "--time=5", f"--output={output}"]
    command = ["sbatch", *options, "slurm/pretrain_7b.sh", "+exp=demo", *arguments]
    done = cluster.run(command, cwd=REPOSITORY, timeout_s=TIMEOUT_S)
    text = output.read_text(encoding="utf-8") if output.exists() else ""
    assert "Submitted batch job" in done.stdout, done.stderr + cluster.logs()
    return done.returncode, text


def test_two_nodes_train_as_two_local_ranks_do(cluster: Cluster, tmp_path: Path) -> None:
    words = [*BARE, "train.steps=3"]
    code, text = submit(cluster, tmp_path, *overrides(tmp_path, *words, run_name="slurm"))
    assert code == 0, text
    for number, node in enumerate(NODES, start=1):
        assert f"node {number} of 2: {node}, 1 ranks" in text, text
    rows = metrics(tmp_path / "slurm")
    assert [row["progress/step"] for row in rows] == [1, 2, 3]
    got = [(row["train/loss"], row["train/grad_norm"]) for row in rows]
    wanted = run_job(tmp_path, 2, "+exp=demo", *words, run_name="local")
    assert max(worst_relative(got, wanted)) < 1e-6


def test_bad_input_ends_the_job_with_exit_code_2(cluster: Cluster, tmp_path: Path) -> None:
    words = overrides(tmp_path, *BARE, "train.global_batch_size=7", run_name="bad")
    code, text = submit(cluster, tmp_path, *words)
    assert code == 2, text
    assert "train.global_batch_size (7)" in text
    assert "node 1 of 2" not in text
    assert not (tmp_path / "bad").exists()
