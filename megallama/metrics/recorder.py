"""Passes the metrics of each step to every sink. Only global rank 0 has a recorder."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megallama.config.schema import LogConfig, WandbMode
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
    settings: LogConfig,
    *,
    steps: int,
    run_values: Mapping[str, Any],
    run_dir: Path,
    first_step: int,
    is_terminal: bool,
    facts: Facts,
) -> Recorder:
    """The recorder of a run, its files opened in `run_dir`. Call it on global rank 0 only.

    Args:
        settings: Which sinks there are.
        steps: Optimizer steps of the whole run.
        run_values: All settings of the run, for the tracker.
        run_dir: Existing folder.
        first_step: Completed steps at the start; a resumed run's files are cut back to it.
        is_terminal: Whether the console is one, and shows a live line.
        facts: From `build_meter`.
    """
    console = ConsoleSink(
        steps=steps,
        first_step=first_step,
        interval=settings.interval,
        is_terminal=is_terminal,
        facts=facts,
    )
    sinks: list[Sink] = [JsonlSink(run_dir / METRICS_FILE, first_step=first_step), console]
    if settings.tensorboard:
        sinks.append(TensorBoardSink(run_dir / TENSORBOARD_FOLDER, first_step=first_step))
    if settings.wandb != WandbMode.disabled:
        values: dict[str, Any] = {"run": dict(run_values), "facts": dict(facts)}
        sinks.append(
            WandbSink(
                run_dir,
                project=settings.wandb_project,
                mode=settings.wandb.value,
                settings=values,
                first_step=first_step,
            )
        )
    return Recorder(sinks)
