"""What a background save costs a real run: a LLaMA trained through the entry, saved every few steps.

    python benchmarks/checkpoint_training.py [--model llama_120m] [--steps 12] [--interval 4] [--folder FOLDER]

One rank; 12 bytes a parameter are saved. The stall is what the run itself records (`checkpoint/stall_ms`: from the
end of a step until training may go on), a step is the median of those of which no save ran beside. The last save is
left out: a run waits for it at its end.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
from pathlib import Path

from random_tokens import write_tokens

from megallama.config.load import load_config
from megallama.metrics.jsonl import load_metrics
from megallama.model.counts import count_parameters
from megallama.train import Trainer

BYTES_PER_PARAMETER = 12


def main() -> None:
    """Train and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama_120m", help="a file of conf/model/ (default llama_120m)")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step (default 4)")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--interval", type=int, default=4, help="steps between saves (default 4)")
    parser.add_argument("--folder", type=Path, default=Path("."), help="on the disk that is measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="checkpoint-benchmark-") as name:
        folder = Path(name).absolute()
        tokens = (options.steps + 1) * options.batch * (options.seq_len + 1)
        write_tokens(
            folder / "train", vocab_size=options.vocab_size, documents=tokens // 1000 + 1, length=1000
        )
        config = load_config(
            [
                f"model={options.model}", f"model.vocab_size={options.vocab_size}",
                f"model.max_seq_len={max(2048, options.seq_len)}", "precision.dtype=fp32", "optim.lr=1e-4",
                "optim.warmup_steps=1", f"train.steps={options.steps}", f"train.seq_len={options.seq_len}",
                f"train.global_batch_size={options.batch}", f"data.sources=[{folder / 'train'}]",
                f"train.run_dir={folder / 'run'}", f"checkpoint.interval={options.interval}",
                "checkpoint.keep=1", "log.wandb=disabled",
            ]
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            Trainer.from_config(config).fit()
        lines = load_metrics(folder / "run" / "metrics.jsonl")
    size = BYTES_PER_PARAMETER * count_parameters(config.model, padded=True)
    # The numbers of a save stand at the step after it; so does the work beside it.
    beside = {line["progress/step"] for line in lines if "checkpoint/stall_ms" in line}
    stalls = [line["checkpoint/stall_ms"] for line in lines if "checkpoint/stall_ms" in line]
    waits = [line.get("checkpoint/wait_ms", 0.0) for line in lines if "checkpoint/stall_ms" in line]
    saves = [line["checkpoint/save_s"] for line in lines if "checkpoint/save_s" in line]
    alone = [
        line["perf/step_ms"]
        for line in lines
        if line["progress/step"] not in beside and line["progress/step"] > 1
    ]
    step_ms = statistics.median(alone)
    print(f"{size / 1e9:.2f} GB of state; a step {step_ms:.0f} ms ({', '.join(f'{ms:.0f}' for ms in alone)})")
    print(
        f"stall of each save, ms: {', '.join(f'{ms:.0f}' for ms in stalls)}; waited for the one before: {waits}"
    )
    print(f"written in the background, s: {', '.join(f'{s:.1f}' for s in saves)}")
    print(
        f"stall / step: {statistics.median(stalls) / step_ms:.3f} ({size / 1e6 / statistics.median(stalls):.2f} GB/s)"
    )


if __name__ == "__main__":
    main()
