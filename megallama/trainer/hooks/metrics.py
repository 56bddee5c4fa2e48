"""The hook that turns each finished step into metrics."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megallama.config.schema import RunConfig
from megallama.host.errors import UserError
from megallama.metrics.meter import Progress, build_meter
from megallama.metrics.recorder import Recorder, build_recorder
from megallama.topology.groups import Topology
from megallama.trainer.hooks.base import Hook, StepReport
from megallama.trainer.run_folder import RunFolder
from megallama.trainer.state import TrainState


class MetricsHook(Hook):
    """Feeds the meter and the sinks; rank 0 has one."""

    def __init__(
        self, config: RunConfig, topology: Topology, *, folder: RunFolder, has_wandb_key: bool
    ) -> None:
        self._config = config
        self._topology = topology
        self._folder = folder
        self._has_wandb_key = has_wandb_key
        self._recorder: Recorder | None = None

    def start(self, state: TrainState) -> None:
        """Open the sinks where the run stands."""
        self._meter, facts = build_meter(
            self._config, world_size=self._topology.world_size, device=self._topology.device
        )
        with self._trouble_told():
            self._recorder = build_recorder(
                self._config,
                run_dir=self._folder.path,
                first_step=state.step,
                is_terminal=sys.stdout.isatty(),
                wandb_key_present=self._has_wandb_key,
                facts=facts,
            )

    def after_step(self, state: TrainState, report: StepReport) -> None:
        """Record one step, with what earlier hooks added to it."""
        assert self._recorder is not None
        progress = Progress(state.step, state.consumed_samples, state.consumed_tokens)
        numbers = self._meter.measure(report.result, progress=progress, seconds=report.seconds)
        with self._trouble_told():
            self._recorder.record(state.step, {**numbers, **report.numbers})

    def finish(self, state: TrainState) -> None:
        """Close the sinks."""
        if self._recorder is not None:
            with self._trouble_told():
                self._recorder.close()

    @contextmanager
    def _trouble_told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"metrics cannot be written to {self._folder.path} ({error.strerror or error}): free some space"
                " there, or make its files writable; the same command resumes from the last checkpoint"
            ) from error
