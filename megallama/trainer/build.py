"""Builds the loop from engine and data, at the step where the run folder stands."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from megallama.batches.loader import Loader
from megallama.checkpoint.distributed.background import BackgroundSaver
from megallama.checkpoint.format.boxes import BoxedTensor, build_boxes
from megallama.checkpoint.format.disk import LOCAL_DISK, Disk
from megallama.checkpoint.format.model_identity import model_identity
from megallama.config.load import to_yaml
from megallama.config.schema import PrecisionConfig, RunConfig
from megallama.engine.build import Engine
from megallama.host.errors import UserError
from megallama.host.log import start_log, stop_log
from megallama.metrics.meter import build_meter
from megallama.metrics.recorder import build_recorder
from megallama.metrics.traffic_meter import TrafficMeter
from megallama.topology.agreement import Ranks
from megallama.topology.groups import Topology
from megallama.trainer.finite import not_finite
from megallama.trainer.hooks.base import (
    CheckpointHook,
    EvalHook,
    GuardHook,
    Hook,
    ParameterPart,
    RunView,
    StopHook,
    diverged,
)
from megallama.trainer.hooks.metrics import MetricsHook
from megallama.trainer.hooks.samples import SamplesHook
from megallama.trainer.hooks.traffic import MeteredEngine
from megallama.trainer.loop import Loop, StepEngine
from megallama.trainer.resume import describe_layout, start_run
from megallama.trainer.run_folder import RunFolder
from megallama.trainer.saver import Saver, SaveReportHook
from megallama.trainer.state import TrainState

log = logging.getLogger(__name__)


@contextmanager
def open_run_folder(config: RunConfig, topology: Topology) -> Iterator[RunFolder]:
    """The run folder with this run's configuration and tokenizer, and a log for every rank."""
    folder = RunFolder(Path(config.train.run_dir))
    with contextlib.ExitStack() as stack:
        refusal: list[UserError | None] = [None]
        if topology.rank == 0:
            try:
                stack.enter_context(folder.lock())
                tokenizer = Path(config.data.tokenizer) if config.data.tokenizer else None
                folder.write_start(config_yaml=to_yaml(config), tokenizer=tokenizer)
            except OSError as error:
                refusal = [_not_writable(folder, error)]
            except UserError as error:
                refusal = [error]
        # Every rank learns of it, so that none waits for the others.
        dist.broadcast_object_list(refusal, src=0, group=topology.host_group)
        if refusal[0] is not None:
            raise refusal[0]
        try:
            handler = start_log(folder.logs, rank=topology.rank)
        except OSError as error:
            raise _not_writable(folder, error) from error
        stack.callback(stop_log, handler)
        log.info("rank %d of %d, %s, %s", topology.rank, topology.world_size, topology.grid, topology.device)
        yield folder


def _not_writable(folder: RunFolder, error: OSError) -> UserError:
    return UserError(
        f"train.run_dir ({folder.path}) cannot be written ({error.strerror}): free space on its disk,"
        " or choose another train.run_dir"
    )


def build_loop(
    config: RunConfig,
    *,
    topology: Topology,
    engine: Engine,
    loader: Loader,
    folder: RunFolder,
    hooks: Sequence[Hook] = (),
    disk: Disk = LOCAL_DISK,
) -> Loop:
    """The loop, resumed from the newest checkpoint that verifies, if there is one.

    `hooks` are the user's own. `disk` writes the checkpoints.
    """
    train = config.train
    state = start_run(
        folder,
        topology=topology,
        model=config.model,
        engine=engine,
        loader=loader,
        init_from=train.init_from,
        dtype=config.precision.dtype,
    )
    loader.check_enough()
    if loader.is_traceable:
        ledger = loader.ledger(state.step)
        # Every rank learns of a failure, so that none waits for the others.
        Ranks(topology.host_group).first(lambda: folder.write_ledger(ledger))
    layout = describe_layout(topology, parallel=config.parallel, zero=config.zero, precision=config.precision)
    resumed_step = state.step if state.step > 0 else None
    saver = Saver(
        BackgroundSaver(
            folder.checkpoints,
            model=model_identity(config.model),
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            # It was read and found intact.
            verified=set() if resumed_step is None else {resumed_step},
            group=topology.save_group,
            disk=disk,
        ),
        config.checkpoint,
        is_first=topology.rank == 0,
        tensors=lambda: build_boxes(engine.fragments(), engine.layout),
        check=partial(_check_finite, config.precision, topology),
        describe=lambda now: {
            "progress": dict(now.to_json()),
            "engine": dict(engine.counters()),
            "layout": layout,
            loader.record_name: loader.ledger(now.step),
        },
        saved_step=resumed_step,
    )

    chain: list[Hook] = [SaveReportHook(saver)]
    if loader.num_validation_batches:
        chain.append(
            EvalHook(engine, loader.validation_batches, interval=config.eval.interval, last_step=train.steps)
        )
    stepper: StepEngine = engine
    if config.log.traffic and topology.rank == 0:
        stepper = metered = MeteredEngine(engine, TrafficMeter(topology))
        chain.append(metered)
    # They see the numbers of evaluation and may add their own, before the step is recorded or saved.
    chain += hooks
    if topology.rank == 0:
        chain.append(_metrics_hook(config, topology, folder=folder))
    if config.log.samples:
        chain += _samples_hooks(topology, folder=folder, loader=loader, completed_steps=state.step)
    chain.append(GuardHook())
    chain.append(CheckpointHook(saver, interval=config.checkpoint.interval, last_step=train.steps))
    chain.append(SignalHook(topology, saver))
    chain.append(LoaderHook(loader))
    view = RunView(
        rank=topology.rank,
        world_size=topology.world_size,
        folder=folder.path,
        parameters=partial(_parameters, engine),
        save=saver.save_now,
    )
    return Loop(
        stepper,
        loader,
        state=state,
        run=view,
        hooks=chain,
        steps=train.steps,
        samples_per_step=train.global_batch_size,
        tokens_per_step=train.global_batch_size * train.seq_len,
    )


def _check_finite(
    precision: PrecisionConfig, topology: Topology, state: TrainState, tensors: Mapping[str, BoxedTensor]
) -> None:
    fault = not_finite(tensors, dtype=precision.dtype, group=topology.host_group)
    if fault is not None:
        raise diverged(state.step, fault)


def _parameters(engine: Engine) -> Iterator[ParameterPart]:
    for key, tensor in build_boxes(engine.fragments(), engine.layout, cap_elements=None).items():
        kind, _, name = key.partition("/")
        if kind == "fp32" and tensor.is_owner:
            yield ParameterPart(name=name, shape=tensor.global_shape, boxes=tensor.boxes)


def _metrics_hook(config: RunConfig, topology: Topology, *, folder: RunFolder) -> MetricsHook:
    meter, facts = build_meter(
        config.model,
        train=config.train,
        precision=config.precision,
        world_size=topology.world_size,
        device=topology.device,
        peak_tflops=config.log.peak_tflops,
    )
    open_recorder = partial(
        build_recorder,
        config.log,
        steps=config.train.steps,
        run_values=asdict(config),
        run_dir=folder.path,
        is_terminal=sys.stdout.isatty(),
        facts=facts,
    )
    return MetricsHook(meter, open_recorder)


def _samples_hooks(
    topology: Topology, *, folder: RunFolder, loader: Loader, completed_steps: int
) -> list[Hook]:
    """One on rank 0; every rank learns of a failure."""
    if not loader.is_traceable:
        raise UserError(
            f"log.samples (true) cannot be had: {type(loader).__name__} does not say which samples a step reads. Set"
            " log.samples=false, or give the loader `sample_ids` and is_traceable = True"
        )

    def opened() -> list[Hook]:
        if topology.rank > 0:
            return []
        return [SamplesHook(folder.samples_file, loader.sample_ids, completed_steps=completed_steps)]

    return Ranks(topology.host_group).everywhere(opened)


SAME_REQUEST_S = 2.0
"""Signals so close together are one request: a rank may get it from Slurm and from torchrun."""


class SignalHook(StopHook):
    """SIGTERM and SIGINT end the run after the step in flight, with a checkpoint; a second one ends it at once."""

    def __init__(self, topology: Topology, saver: Saver) -> None:
        super().__init__(self._is_any_rank_asked, saver)
        self._topology = topology
        self._received_s: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def start(self, state: TrainState, run: RunView) -> None:
        """Listen."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)

    def finish(self, state: TrainState) -> None:
        """Leave the signals as they were."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received_s is None:
            self._received_s = now
        elif now - self._received_s > SAME_REQUEST_S:
            _end_at_once(number, is_first=self._topology.rank == 0)

    def _is_any_rank_asked(self) -> bool:
        asked = torch.tensor(int(self._received_s is not None))
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._topology.host_group)
        if asked:
            log.warning("asked to stop: saving a checkpoint")
        return bool(asked)


def _end_at_once(number: int, *, is_first: bool) -> NoReturn:
    """End this process as kill -9 would, which no checkpoint minds; an orderly end would wait for a writing thread."""
    if is_first:
        text = "WARNING: asked to stop again: ended at once, without the last save; older checkpoints are untouched\n"
        # Not through `log`: the signal may have come within one of its calls.
        os.write(2, text.encode())
    os._exit(128 + number)


class LoaderHook(Hook):
    """Ends the loader's background reading with the run."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def finish(self, state: TrainState) -> None:
        """Close."""
        self._loader.close()
