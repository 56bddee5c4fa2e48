"""Passes the metrics of each step to every sink. Only global rank 0 has a recorder."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from megallama.config.schema import RunConfig, WandbMode
from megallama.metrics.console import ConsoleSink
from megallama.metrics.jsonl import METRICS_FILE, JsonlSink
from megallama.metrics.meter import Facts
from megallama.metrics.tensorboard import TensorBoardSink
from megallama.metrics.wandb import WandbSink

log = logging.getLogger(__name__)

TENSORBOARD_FOLDER = "tensorboard"


class Sink(Protocol):
    """Takes the metrics of each step."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of one completed step."""

    def close(self) -> None:
        """Finish; nothing is written afterwards."""


class Recorder:
    """Hands each step to all sinks, in their order."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = tuple(sinks)

    def record(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write one completed step. `numbers`: from `Meter.measure`, and `eval/...` where there was one."""
        for sink in self.sinks:
            sink.write(step, numbers)

    def close(self) -> None:
        """Close every sink, also when one of them fails, and raise the first failure at the end."""
        failures: list[Exception] = []
        for sink in self.sinks:
            try:
                sink.close()
            except Exception as error:
                is_of_disk = isinstance(error, OSError)
                log.error("closing %s failed (%s)", type(sink).__name__, error, exc_info=not is_of_disk)
                failures.append(error)
        if failures:
            raise failures[0]


def build_recorder(
    config: RunConfig,
    *,
    run_dir: Path,
    first_step: int,
    is_terminal: bool,
    wandb_key_present: bool,
    facts: Facts,
) -> Recorder:
    """The recorder of a run, its files opened in `run_dir`. Call it on global rank 0 only.

    Args:
        config: The run.
        run_dir: Existing folder.
        first_step: Completed steps at the start; a resumed run's files are cut back to it.
        is_terminal: Whether the console is one, and shows a live line.
        wandb_key_present: Whether Weights & Biases could be reached without asking for a key.
        facts: From `build_meter`.
    """
    console = ConsoleSink(
        steps=config.train.steps,
        first_step=first_step,
        interval=config.log.interval,
        is_terminal=is_terminal,
        facts=facts,
    )
    sinks: list[Sink] = [JsonlSink(run_dir / METRICS_FILE, first_step=first_step), console]
    if config.log.tensorboard:
        sinks.append(TensorBoardSink(run_dir / TENSORBOARD_FOLDER, first_step=first_step))
    mode = config.log.wandb
    if mode == WandbMode.auto:
        mode = WandbMode.online if wandb_key_present else WandbMode.offline
        log.info(
            "log.wandb: auto is %s (%s)", mode.value, "key found" if wandb_key_present else "no WANDB_API_KEY"
        )
    if mode == WandbMode.online and not wandb_key_present:
        log.warning("log.wandb=online, but there is no WANDB_API_KEY: writing an offline run")
        mode = WandbMode.offline
    if mode != WandbMode.disabled:
        settings: dict[str, Any] = {"run": asdict(config), "facts": dict(facts)}
        sinks.append(WandbSink(run_dir, project=config.log.wandb_project, mode=mode.value, settings=settings))
    return Recorder(sinks)
