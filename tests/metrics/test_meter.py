"""Numbers of a step."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megallama.config.schema import (
    Dtype,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)
from megallama.engine.step import StepResult
from megallama.metrics.meter import Meter, Progress, build_meter, peak_memory_gib
from megallama.metrics.peak import Peak
from megallama.model.counts import train_flops_per_token

CPU = torch.device("cpu")
RESULT = StepResult(loss=2.5, grad_norm=0.7, lr=1e-3, num_tokens=900, loss_scale=1024.0, is_skipped=False)
CONFIG = RunConfig(
    model=ModelConfig(
        name="小模型",
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_heads=4,
        vocab_size=1000,
        max_seq_len=128,
    ),
    train=TrainConfig(steps=10, run_dir="unused", seq_len=100, global_batch_size=10),
    optim=OptimConfig(lr=1e-3),
)
KEYS = {
    "train/loss",
    "train/grad_norm",
    "train/lr",
    "train/skipped",
    "perf/tokens_per_s_per_gpu",
    "perf/tokens_per_s",
    "perf/mfu",
    "perf/step_ms",
    "perf/memory_gib",
    "progress/step",
    "progress/consumed_tokens",
    "progress/consumed_samples",
    "progress/eta_s",
}


def meter(**changes: object) -> Meter:
    """A meter of 10 steps of 1000 tokens on 4 ranks of 2 TFLOP/s."""
    arguments: dict[str, object] = dict(
        steps=10,
        tokens_per_step=1000,
        world_size=4,
        flops_per_token=1e9,
        peak=Peak(2.0, "test"),
        device=CPU,
    )
    return Meter(**{**arguments, **changes})  # type: ignore[arg-type]


def at(step: int) -> Progress:
    """Progress after `step` steps."""
    return Progress(step=step, consumed_samples=10 * step, consumed_tokens=1000 * step)


def test_one_step() -> None:
    numbers = meter().measure(RESULT, progress=at(1), seconds=0.5)
    assert set(numbers) == KEYS
    assert numbers["train/loss"] == 2.5
    assert numbers["perf/step_ms"] == 500.0
    assert numbers["perf/tokens_per_s"] == 2000.0
    assert numbers["perf/tokens_per_s_per_gpu"] == 500.0
    # 500 tokens/s x 1e9 FLOPs of 2e12 FLOP/s.
    assert numbers["perf/mfu"] == pytest.approx(0.25)
    assert numbers["progress/consumed_tokens"] == 1000


def test_loss_scale_is_a_metric_under_fp16_only() -> None:
    numbers = meter(has_loss_scale=True).measure(RESULT, progress=at(1), seconds=1.0)
    assert numbers["train/loss_scale"] == 1024.0
    half = dataclasses.replace(CONFIG, precision=PrecisionConfig(dtype=Dtype.fp16))
    built, _ = build_meter(half.model, train=half.train, precision=half.precision, world_size=1, device=CPU)
    assert "train/loss_scale" in built.measure(RESULT, progress=at(1), seconds=1.0)


def test_skipped_step() -> None:
    skipped = dataclasses.replace(RESULT, is_skipped=True, grad_norm=math.inf)
    numbers = meter().measure(skipped, progress=at(1), seconds=1.0)
    assert numbers["train/skipped"] == 1 and numbers["train/grad_norm"] == math.inf


def test_remaining_time_leaves_out_the_first_step() -> None:
    one = meter()
    one.measure(RESULT, progress=at(1), seconds=60.0)
    for step in (2, 3, 4):
        numbers = one.measure(RESULT, progress=at(step), seconds=2.0)
    assert numbers["progress/eta_s"] == pytest.approx(6 * 2.0)
    assert one.measure(RESULT, progress=at(10), seconds=2.0)["progress/eta_s"] == 0.0


def test_remaining_time_follows_a_change_of_pace() -> None:
    one = meter(steps=200)
    for step in range(1, 60):
        one.measure(RESULT, progress=at(step), seconds=1.0)
    for step in range(60, 120):
        numbers = one.measure(RESULT, progress=at(step), seconds=3.0)
    assert numbers["progress/eta_s"] == pytest.approx(81 * 3.0, rel=0.02)


def test_built_from_a_configuration() -> None:
    built, facts = build_meter(
        CONFIG.model, train=CONFIG.train, precision=CONFIG.precision, world_size=2, device=CPU
    )
    numbers = built.measure(RESULT, progress=at(1), seconds=1.0)
    flops = train_flops_per_token(CONFIG.model, seq_len=100, attention="causal")
    assert facts["mfu_attention"] == "causal" and facts["peak_source"] == "measured matmul"
    assert numbers["perf/tokens_per_s"] == 1000.0
    assert numbers["perf/mfu"] == pytest.approx(500.0 * flops / (float(facts["peak_tflops"]) * 1e12))


def test_memory_of_the_process_is_in_gib() -> None:
    before = peak_memory_gib(CPU)
    block = torch.ones(128, 2**20)  # half a GiB
    grown = peak_memory_gib(CPU) - before
    assert 0.02 < before < 20
    assert grown <= 0.6 and peak_memory_gib(CPU) >= block.numel() * 4 / 2**30
