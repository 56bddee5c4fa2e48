"""Part of `data.py`: our loader against megatron-core's GPTDataset and BlendedDataset on the same files.

Measured for each, in a process of its own, alternating: seconds and memory from opening two blended sources to
the first batch (megatron-core builds its index then, for one epoch, without a cache); tokens/s of the steps after
it, by the clock and by processor time, in one process and thread pool as each has it; and the seconds of one batch
far away. megatron-core can be asked only for samples that it has indexed, so ours alone is asked for step
10,000,000 and compared with its own step 10. `cut` is ours with `data.packing=cut`, which alone writes an index,
against megatron-core's. The token files are sparse: they take no disk, and reading them costs memory bandwidth only.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
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

NAMES = ("a", "b")
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

    def __init__(self, prefixes: list[str], options: argparse.Namespace, *, is_cut: bool = False) -> None:
        from megallama.batches.micro_batch import RankPart
        from megallama.config.schema import (
            DataConfig,
            EvalConfig,
            Packing,
            SourceConfig,
            TrainConfig,
        )
        from megallama.stream.loader import open_loader

        sources = [SourceConfig(path=p, weight=w) for p, w in zip(prefixes, WEIGHTS, strict=True)]
        train = TrainConfig(
            steps=FAR_STEP * 2,
            run_dir=tempfile.mkdtemp(dir=options.folder),
            seq_len=options.seq_len,
            global_batch_size=options.batch,
        )
        data = DataConfig(sources=sources, packing=Packing.cut if is_cut else Packing.continued)
        self._loader = open_loader(
            data, train=train, vocab_size=VOCAB_SIZE, evaluation=EvalConfig(), part=RankPart()
        )

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

    import megallama.stream.loader  # noqa: F401

    torch.set_num_threads(1)
    before, begun = peak_mib(), time.perf_counter()
    readers = {"ours": Ours, "megatron": Megatron, "cut": functools.partial(Ours, is_cut=True)}
    reader = readers[kind](prefixes, options)
    reader.read(0)
    figures = {"index_s": time.perf_counter() - begun, "index_mib": peak_mib() - before}
    if kind != "cut":
        begun, begun_cpu = time.perf_counter(), time.process_time()
        for step in range(1, options.steps + 1):
            reader.read(step)
        tokens = options.steps * options.batch * options.seq_len
        figures["tokens_per_s"] = tokens / (time.perf_counter() - begun)
        figures["tokens_per_cpu_s"] = tokens / (time.process_time() - begun_cpu)
        for name, step in (("seek_10_s", 10), ("seek_10_million_s", FAR_STEP)):
            if kind == "megatron" and step == FAR_STEP:
                continue
            time.sleep(0.3)  # reading ahead of the last step is over
            begun = time.perf_counter()
            reader.read(step)
            figures[name] = time.perf_counter() - begun
    reader.close()
    return figures


def measure_apart(kind: str, options: argparse.Namespace) -> dict[str, float]:
    words = [sys.executable, __file__, kind, json.dumps(vars(options))]
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def report(rounds: dict[str, list[dict[str, float]]]) -> Iterator[str]:
    """Medians, and ours over megatron-core's."""
    ours, other, cut = (
        {name: statistics.median(r[name] for r in rounds[kind]) for name in rounds[kind][0]}
        for kind in ("ours", "megatron", "cut")
    )
    yield f"{'':22}{'megallama':>14}{'megatron-core':>14}{'ratio':>9}"
    for name, value in ours.items():
        if name in other:
            yield f"{name:22}{value:14.4g}{other[name]:14.4g}{value / max(other[name], 1e-9):9.3f}"
    for name, value in cut.items():
        yield f"{'cut ' + name:22}{value:14.4g}{other[name]:14.4g}{value / max(other[name], 1e-9):9.3f}"
    near, far = ours["seek_10_s"], ours["seek_10_million_s"]
    yield f"{'seek_10_million_s':22}{far:14.4g}{'':14}{far / max(near, 1e-9):9.3f} of our seek_10_s"


def compare_loaders(
    *, tokens: int, mean_length: int, seq_len: int, batch: int, steps: int, rounds: int
) -> Iterator[str]:
    """Lines of the report.

    Args:
        tokens: Of both sources together.
        mean_length: Tokens of a document.
        seq_len: Tokens of a sample.
        batch: Samples of a step.
        steps: Steps that are timed.
        rounds: How often each is measured.
    """
    if (steps + 1) * batch > tokens // seq_len:
        raise SystemExit("the steps need more samples than --tokens hold: lower --steps or --batch")
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, weight) in enumerate(zip(NAMES, WEIGHTS, strict=True)):
            # A little more than its share, so that one epoch is enough for both.
            own = int(tokens * (weight + 0.02))
            write_sparse(Path(folder) / name, tokens=own, mean_length=mean_length, seed=number)
        options = argparse.Namespace(folder=folder, tokens=tokens, seq_len=seq_len, batch=batch, steps=steps)
        found: dict[str, list[dict[str, float]]] = {"ours": [], "megatron": [], "cut": []}
        for _ in range(rounds):
            for kind, figures in found.items():
                figures.append(measure_apart(kind, options))
        yield from report(found)


if __name__ == "__main__":  # a process of `measure_apart`
    asked = argparse.Namespace(**json.loads(sys.argv[2]))
    print(json.dumps(measure(sys.argv[1], [f"{asked.folder}/{name}" for name in NAMES], asked)))
