"""Our loader against megatron-core's GPTDataset and BlendedDataset on the same files, in one run.

    python benchmarks/data_loader.py [--tokens 1e9] [--seq-len 4096] [--batch 64] [--steps 200] [--rounds 3]

Measured for each, in a process of its own, alternating: seconds and memory from opening two blended sources to
the first batch (megatron-core builds its index then, for one epoch, without a cache); tokens/s of the steps after
it, in one process and thread pool as each has it; and the seconds of one batch far away. megatron-core can be asked
only for samples that it has indexed, so ours alone is asked for step 10,000,000. The token files are sparse:
they take no disk, and reading them costs memory bandwidth only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

WEIGHTS = (0.7, 0.3)
FAR_STEP = 10_000_000
VOCAB_SIZE = 32_000


def write_sparse(prefix: Path, *, tokens: int, mean_length: int, seed: int) -> None:
    """A token file of zeros in documents of random lengths, as megatron-core's index writer would describe it."""
    generator = np.random.default_rng(seed)
    lengths = generator.geometric(1 / mean_length, size=max(1, tokens // mean_length)).astype(np.int32)
    ends = np.cumsum(lengths, dtype=np.int64)
    with open(f"{prefix}.idx", "wb") as stream:
        stream.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(lengths), len(lengths) + 1))
        stream.write(lengths.tobytes())
        stream.write(((ends - lengths) * 2).tobytes())
        stream.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
    with open(f"{prefix}.bin", "wb") as stream:
        stream.truncate(int(ends[-1]) * 2)


class Ours:
    """megallama's loader."""

    def __init__(self, prefixes: list[str], options: argparse.Namespace) -> None:
        from megallama.config.schema import DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig
        from megallama.data.loader import open_loader

        sources = [SourceConfig(path=p, weight=w) for p, w in zip(prefixes, WEIGHTS, strict=True)]
        train = TrainConfig(
            steps=FAR_STEP * 2,
            run_dir=options.folder,
            seq_len=options.seq_len,
            global_batch_size=options.batch,
        )
        config = RunConfig(
            model=ModelConfig(vocab_size=VOCAB_SIZE), train=train, data=DataConfig(sources=sources)
        )
        self._loader = open_loader(config, dp_rank=0, dp_size=1, num_micro_batches=1)

    def read(self, step: int) -> Any:
        """One batch."""
        return self._loader.batches(step)

    def close(self) -> None:
        """End the reading thread."""
        self._loader.close()


class Megatron:
    """megatron-core's datasets, read and collated as its trainer's loader does without workers."""

    def __init__(self, prefixes: list[str], options: argparse.Namespace) -> None:
        import torch
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

        # BlendedDataset asks for its rank.
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

        class Tokenizer:
            eod, pad, vocab_size, unique_identifiers = 2, 0, VOCAB_SIZE, {"name": "benchmark"}

        config = GPTDatasetConfig(
            random_seed=1234,
            sequence_length=options.seq_len,
            blend_per_split=[(prefixes, list(WEIGHTS)), None, None],
            tokenizer=Tokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            path_to_cache=tempfile.mkdtemp(dir=options.folder),
            mid_level_dataset_surplus=0.005,
        )
        self._batch = options.batch
        samples = int(options.tokens) // options.seq_len
        builder = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config)
        with contextlib.redirect_stdout(sys.stderr):
            self._dataset = builder.build()[0]

    def read(self, step: int) -> Any:
        """One batch."""
        import torch

        first = step * self._batch
        return torch.utils.data.default_collate([self._dataset[i] for i in range(first, first + self._batch)])

    def close(self) -> None:
        """Nothing is open."""


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(kind: str, prefixes: list[str], options: argparse.Namespace) -> dict[str, float]:
    """Figures of one implementation; runs in a process of its own."""
    import megatron.core.datasets.gpt_dataset  # noqa: F401 - both need it loaded: its time and memory are not counted
    import torch

    import megallama.data.loader  # noqa: F401

    torch.set_num_threads(1)
    before, begun = peak_mib(), time.perf_counter()
    reader = {"ours": Ours, "megatron": Megatron}[kind](prefixes, options)
    reader.read(0)
    figures = {"index_s": time.perf_counter() - begun, "index_mib": peak_mib() - before}
    begun = time.perf_counter()
    for step in range(1, options.steps + 1):
        reader.read(step)
    taken = time.perf_counter() - begun
    figures["tokens_per_s"] = options.steps * options.batch * options.seq_len / taken
    for name, step in (("seek_10_s", 10), ("seek_10_million_s", FAR_STEP)):
        if kind == "megatron" and step == FAR_STEP:
            continue
        begun = time.perf_counter()
        reader.read(step)
        figures[name] = time.perf_counter() - begun
    reader.close()
    return figures


def measure_apart(kind: str, options: argparse.Namespace) -> dict[str, float]:
    words = [sys.executable, __file__, *sys.argv[1:], "--folder", options.folder, "--measure", kind]
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def report(rounds: dict[str, list[dict[str, float]]]) -> Iterator[str]:
    """Medians, and ours over megatron-core's."""
    ours, other = (
        {name: statistics.median(r[name] for r in found) for name in found[0]} for found in rounds.values()
    )
    yield f"{'':22}{'megallama':>14}{'megatron-core':>14}{'ratio':>9}"
    for name, value in ours.items():
        compared = other.get(name)
        shown = "" if compared is None else f"{compared:14.4g}{value / max(compared, 1e-9):9.3f}"
        yield f"{name:22}{value:14.4g}{shown}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=float, default=1e9, help="of both sources together")
    parser.add_argument("--mean-length", type=int, default=1000, help="tokens of a document")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        prefixes = [f"{options.folder}/{name}" for name in ("a", "b")]
        print(json.dumps(measure(options.measure, prefixes, options)))
        return
    if (options.steps + 1) * options.batch > options.tokens // options.seq_len:
        parser.error("the steps need more samples than --tokens hold: lower --steps or --batch")
    with tempfile.TemporaryDirectory() as folder:
        options.folder = folder
        for number, (name, weight) in enumerate(zip("ab", WEIGHTS, strict=True)):
            # A little more than its share, so that one epoch is enough for both.
            write_sparse(
                Path(folder) / name,
                tokens=int(options.tokens * (weight + 0.02)),
                mean_length=options.mean_length,
                seed=number,
            )
        rounds: dict[str, list[dict[str, float]]] = {"ours": [], "megatron": []}
        for _ in range(options.rounds):
            for kind, found in rounds.items():
                found.append(measure_apart(kind, options))
        print("\n".join(report(rounds)))


if __name__ == "__main__":
    main()
