"""Computes the metrics of a run from the numbers of a step, with the keys that all sinks share."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megallama.config.schema import Dtype, ModelConfig, PrecisionConfig, TrainConfig
from megallama.engine.step import StepResult
from megallama.metrics.peak import Peak, peak_of
from megallama.model.counts import Attention, count_parameters, train_flops_per_token

MFU_ATTENTION: Attention = "causal"
"""Convention of `perf/mfu`; it stands in the run's facts as `mfu_attention`."""

Facts = Mapping[str, str | int | float]
"""What is the same for all steps of a run, for headings and the trackers' configuration."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a step."""

    step: int
    """Completed optimizer steps."""
    consumed_samples: int
    """Sequences trained on."""
    consumed_tokens: int
    """Tokens of these sequences."""


class Meter:
    """Measures one run on one rank.

    The first step of a process pays for compilation and caches: its own numbers are reported as they are, but
    the remaining time is estimated from the later steps only.
    """

    def __init__(
        self,
        *,
        steps: int,
        tokens_per_step: int,
        world_size: int,
        flops_per_token: float,
        peak: Peak,
        device: torch.device,
        has_loss_scale: bool = False,
    ) -> None:
        """A meter; `build_meter` derives the arguments from a configuration.

        Args:
            steps: Optimizer steps of the whole run.
            tokens_per_step: Tokens of one step over the job, masked ones included.
            world_size: Ranks of the job.
            flops_per_token: Forward and backward, in the convention of `MFU_ATTENTION`.
            peak: Peak of one rank's device.
            device: Where memory is measured.
            has_loss_scale: Whether `train/loss_scale` is reported (fp16).
        """
        self._steps = steps
        self._tokens_per_step = tokens_per_step
        self._world_size = world_size
        self._flops_per_token = flops_per_token
        self._peak_flops = peak.tflops * 1e12
        self._device = device
        self._has_loss_scale = has_loss_scale
        self._num_timed = 0
        self._step_s = 0.0

    def measure(self, result: StepResult, *, progress: Progress, seconds: float) -> dict[str, float]:
        """Metrics of one step that took `seconds`; `progress` already counts it."""
        tokens_per_s = self._tokens_per_step / seconds
        tokens_per_s_per_gpu = tokens_per_s / self._world_size
        numbers: dict[str, float] = {
            "train/loss": result.loss,
            "train/grad_norm": result.grad_norm,
            "train/lr": result.lr,
            "train/skipped": int(result.is_skipped),
            "perf/step_ms": seconds * 1e3,
            "perf/tokens_per_s": tokens_per_s,
            "perf/tokens_per_s_per_gpu": tokens_per_s_per_gpu,
            "perf/mfu": tokens_per_s_per_gpu * self._flops_per_token / self._peak_flops,
            "perf/memory_gib": peak_memory_gib(self._device),
            "progress/step": progress.step,
            "progress/consumed_samples": progress.consumed_samples,
            "progress/consumed_tokens": progress.consumed_tokens,
            "progress/eta_s": self._eta_s(progress.step, seconds=seconds),
        }
        if self._has_loss_scale:
            numbers["train/loss_scale"] = result.loss_scale
        return numbers

    def _eta_s(self, step: int, *, seconds: float) -> float:
        """Seconds that the remaining steps will take at the mean pace of about the last twenty."""
        if self._num_timed > 0:
            weight = max(1.0 / self._num_timed, 0.1)
            self._step_s += weight * (seconds - self._step_s)
        self._num_timed += 1
        return (self._steps - step) * (self._step_s if self._num_timed > 1 else seconds)


def build_meter(
    model: ModelConfig,
    *,
    train: TrainConfig,
    precision: PrecisionConfig,
    world_size: int,
    device: torch.device,
    peak_tflops: float | None = None,
) -> tuple[Meter, Facts]:
    """The meter of a run, and the run's facts: sizes, peak and conventions that its numbers rest on."""
    dtype = precision.dtype
    peak = peak_of(device, dtype=dtype, given_tflops=peak_tflops)
    flops_per_token = train_flops_per_token(model, seq_len=train.seq_len, attention=MFU_ATTENTION)
    meter = Meter(
        steps=train.steps,
        tokens_per_step=train.global_batch_size * train.seq_len,
        world_size=world_size,
        flops_per_token=flops_per_token,
        peak=peak,
        device=device,
        has_loss_scale=dtype == Dtype.fp16,
    )
    facts: dict[str, str | int | float] = {
        "model": model.name,
        "parameters": count_parameters(model, padded=False),
        "world_size": world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": dtype.value,
        "flops_per_token": flops_per_token,
        "mfu_attention": MFU_ATTENTION,
        "peak_tflops": peak.tflops,
        "peak_source": peak.source,
        "memory_kind": "peak allocated" if device.type == "cuda" else "peak resident",
    }
    return meter, facts


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far: allocated by torch on a CUDA device, else resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_rss / 2**30 if sys.platform == "darwin" else peak_rss / 2**20
