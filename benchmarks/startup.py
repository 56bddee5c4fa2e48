"""Seconds from `torchrun` to the end of the first step, and to the message of a mistake in the command line.

    python benchmarks/startup.py [--ranks 1 8] [--rounds 3]

The floor, measured alternating with it in the same run, is torchrun on a script that imports torch, megatron-core
and DeepSpeed, joins a process group and meets at a barrier: what no trainer on these libraries can go below.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from random_tokens import write_tokens

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 600.0

FLOOR = """
import os, torch, deepspeed
import megatron.core.pipeline_parallel.schedules, megatron.core.models.gpt.gpt_model
if torch.cuda.is_available():
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def torchrun(ranks: int, script: Path, *arguments: str) -> float:
    """Run to the end; returns the seconds."""
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        "--standalone",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begun = time.perf_counter()
    process = subprocess.run(
        [*words, str(script), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    seconds = time.perf_counter() - begun
    if process.returncode and "no_such_key" not in " ".join(arguments):
        raise SystemExit(f"{script.name} failed:\n{process.stderr[-3000:]}")
    return seconds


def first_step(folder: Path, ranks: int, number: int) -> tuple[float, float]:
    """Seconds from the command to the first step's metrics, and to the end of a run of that one step."""
    run_dir = folder / f"run-{ranks}-{number}"
    begun_s = time.time()
    whole = torchrun(
        ranks,
        ROOT / "launch" / "train.py",
        "model=llama_tiny",
        "model.vocab_size=128",
        f"data.sources=[{{path: {folder / 'tokens'}}}]",
        f"train.run_dir={run_dir}",
        "train.steps=1",
        "train.seq_len=32",
        "train.micro_batch_size=1",
        "train.global_batch_size=8",
        "precision.dtype=fp32",
        "optim.lr=1e-3",
        "optim.warmup_steps=0",
        "checkpoint.interval=0",
        "log.tensorboard=false",
        "log.wandb=disabled",
    )
    return (run_dir / "metrics.jsonl").stat().st_mtime - begun_s, whole


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(folder / "tokens", vocab_size=127, documents=64, length=65)
        floor_script = folder / "floor.py"
        floor_script.write_text(FLOOR, encoding="utf-8")
        for ranks in arguments.ranks:
            steps, wholes, floors, refusals = [], [], [], []
            for number in range(arguments.rounds):
                step, whole = first_step(folder, ranks, number)
                steps.append(step)
                wholes.append(whole)
                floors.append(torchrun(ranks, floor_script))
                refusals.append(torchrun(ranks, ROOT / "launch" / "train.py", "no_such_key=1"))
            ratio = statistics.median(s / f for s, f in zip(steps, floors, strict=True))
            print(
                f"{ranks} ranks on {os.cpu_count()} cores: first step done after {statistics.median(steps):.1f} s,"
                f" libraries alone {statistics.median(floors):.1f} s, ratio {ratio:.2f};"
                f" run of one step ends after {statistics.median(wholes):.1f} s;"
                f" a mistake is reported and over after {statistics.median(refusals):.1f} s"
            )


if __name__ == "__main__":
    main()
