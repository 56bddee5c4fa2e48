"""Whole training runs for tests: a small dataset, a small configuration, and the numbers that a run leaves behind."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.prepare.token_writer import TokenWriter
from megallama.tokenizers.interface import Tokenizer
from megallama.tokens.token_file import TokenFile
from tests.support.ranks import run_ranks

VOCAB_SIZE = 128

SMALL = [
    "model=llama_tiny",
    f"model.vocab_size={VOCAB_SIZE}",
    "model.num_layers=4",
    "precision.dtype=fp32",
    "train.seq_len=32",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
    "train.steps=5",
    "optim.lr=1e-3",
    # Adam's usual eps of 1e-8 turns rounding in near-zero gradients into full-size updates.
    "optim.eps=1e-6",
    "checkpoint.interval=0",
    "log.tensorboard=false",
    "log.wandb=disabled",
    # Measuring it takes longer than the steps.
    "log.peak_tflops=1",
]
"""A run of 5 steps on CPU; two layers a stage under pp=2."""


def write_dataset(prefix: Path, *, documents: int = 60, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> None:
    """A `.bin`/`.idx` pair with learnable documents: each counts upwards from a random start."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for _ in range(documents):
        length = int(generator.integers(20, 90))
        start = int(generator.integers(0, vocab_size))
        document = (start + np.arange(length)) % (vocab_size - 1) + 1
        builder.add_document(np.append(document, 0), [length + 1])
    builder.finalize(f"{prefix}.idx")


def write_prepared(prefix: Path, *, documents: int = 60, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> None:
    """The documents of `write_dataset` as `megallama prepare` writes them: two bytes a token, and a manifest."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    plain = prefix.with_name(f"{prefix.name}-plain")
    write_dataset(plain, documents=documents, seed=seed, vocab_size=vocab_size)
    file = TokenFile(plain)
    facts = SimpleNamespace(name="数", sha256="0", vocab_size=vocab_size, eod_id=0)
    with TokenWriter(prefix, tokenizer=cast(Tokenizer, facts)) as writer:
        tokens = file.view(0, file.num_tokens).astype(np.uint16)
        writer.add(tokens, file.document_lengths, np.zeros((file.num_documents, 2), np.int64))
        writer.finish()
    for suffix in (".bin", ".idx"):
        Path(f"{plain}{suffix}").unlink()


def overrides(folder: Path, *extra: str, run_name: str = "run") -> list[str]:
    """SMALL on a dataset under `folder` (written at the first call), plus `extra`."""
    prefix = folder / "data" / "train"
    if not prefix.with_suffix(".idx").exists():
        write_dataset(prefix)
    return [*SMALL, f"data.sources=[{{path: {prefix}}}]", f"train.run_dir={folder / run_name}", *extra]


def train(arguments: list[str], **parts: Any) -> bool:
    """One rank of a run; called in every rank. `parts` are arguments of `Trainer.from_config`."""
    return train_config(load_config(arguments), **parts)


def train_config(config: RunConfig, **parts: Any) -> bool:
    """The same of a configuration that was composed once, for all ranks."""
    from megallama.train import Trainer

    return Trainer.from_config(config, **parts).fit()


def wait_for_save() -> None:
    """Until the background save of this process has ended, if there is one."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint-save":
            thread.join()


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def run_job(folder: Path, world_size: int, *extra: str, run_name: str = "run") -> list[tuple[float, float]]:
    """Train on `world_size` ranks; the (loss, gradient norm) of each step."""
    run_ranks(world_size, train_config, load_config(overrides(folder, *extra, run_name=run_name)))
    return [(line["train/loss"], line["train/grad_norm"]) for line in metrics(folder / run_name)]


def worst_relative(got: list[tuple[float, float]], wanted: list[tuple[float, float]]) -> tuple[float, float]:
    """Largest relative difference of loss and of gradient norm over the steps."""
    assert len(got) == len(wanted), (got, wanted)
    pairs = list(zip(got, wanted, strict=True))
    return tuple(max(abs(g[i] - w[i]) / abs(w[i]) for g, w in pairs) for i in (0, 1))  # type: ignore[return-value]
