"""Starts a run: from its newest intact checkpoint, from the weights of another run, or from scratch."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megallama.checkpoint.distributed.store import load_checkpoint
from megallama.checkpoint.format.boxes import build_boxes
from megallama.checkpoint.format.integrity import intact_checkpoint, latest_checkpoint
from megallama.checkpoint.format.model_identity import model_differences, model_identity
from megallama.checkpoint.format.protocol import read_manifest, step_name
from megallama.config.same_model import WITHOUT_WEIGHTS
from megallama.config.schema import RunConfig
from megallama.engine.build import Engine
from megallama.host.errors import UserError
from megallama.huggingface.weights import load_hugging_face
from megallama.stream.loader import DataLoader
from megallama.topology.agreement import Ranks
from megallama.topology.groups import Topology
from megallama.trainer.init_from import is_hugging_face_source
from megallama.trainer.run_folder import RunFolder
from megallama.trainer.state import TrainState

log = logging.getLogger(__name__)


COUNTERS = {"adam_step", "loss_scale", "loss_scale_iteration", "loss_scale_last_overflow"}


def start_run(
    config: RunConfig, topology: Topology, *, engine: Engine, loader: DataLoader, folder: RunFolder
) -> TrainState:
    """Fill the engine and set the loader to its place; the progress that the run begins with.

    The newest checkpoint of the run folder that verifies is resumed from; damaged ones are named in the log. Where
    there is none, `train.init_from` gives the weights, with a fresh optimizer, from step 0.

    Raises:
        UserError: checkpoints are there and none can be used, or one is of another model.
    """
    path = latest_checkpoint(folder.checkpoints, log=log.warning, group=topology.host_group)
    source = config.train.init_from
    if path is not None:
        if source is not None:
            log.info("train.init_from (%s) is not used: the run has checkpoints of its own", source)
        return _resume(config, topology, engine=engine, loader=loader, path=path)
    if source is not None:
        _take_weights(config, topology, engine=engine, source=Path(source))
    return TrainState()


def describe_layout(config: RunConfig, topology: Topology) -> dict[str, Any]:
    """How the run that writes a checkpoint is cut: for people, a load needs none of it."""
    grid = topology.grid
    sizes = {"ranks": topology.world_size, "dp": grid.dp, "tp": grid.tp, "pp": grid.pp, "cp": grid.cp}
    return {
        **sizes,
        "vp": config.parallel.vp,
        "zero": config.zero.stage,
        "dtype": config.precision.dtype.value,
    }


def _resume(
    config: RunConfig, topology: Topology, *, engine: Engine, loader: DataLoader, path: Path
) -> TrainState:
    group = topology.host_group
    stored = Ranks(group).first(lambda: read_manifest(path).state)
    state, counters = _progress(path, stored), _counters(path, stored)
    if "data" not in stored:
        log.warning("%s has no record of consumed data: every source begins a new epoch", path)
    loader.resume(stored.get("data"), step=state.step, consumed_samples=state.consumed_samples)
    load_checkpoint(
        path,
        tensors=build_boxes(engine.fragments(), engine.layout),
        model=model_identity(config.model),
        group=group,
    )
    engine.restore(counters)
    log.info("resumed from %s at step %d", path, state.step)
    return state


def _take_weights(config: RunConfig, topology: Topology, *, engine: Engine, source: Path) -> None:
    group, path = topology.host_group, source
    tensors = build_boxes(engine.fragments(), engine.layout)
    model = model_identity(config.model)
    if Ranks(group).first(lambda: is_hugging_face_source(source)):
        there = load_hugging_face(source, tensors=tensors, model=config.model, group=group)
    else:
        path = intact_checkpoint(source, log=log.warning, group=group)
        load_checkpoint(
            path, tensors=tensors, model=model, kind="fp32", may_differ=WITHOUT_WEIGHTS, group=group
        )
        there = Ranks(group).first(lambda: read_manifest(path).model)
    engine.restore(engine.counters())
    log.info("weights from %s, fresh optimizer", path)
    differences = model_differences(there, model)
    if differences and topology.rank == 0:
        log.warning(
            "the weights of %s were trained with other settings than this run's (%s)",
            path,
            "; ".join(differences),
        )


def _progress(path: Path, stored: Mapping[str, Any]) -> TrainState:
    if "progress" not in stored:
        raise UserError(
            f"checkpoint {path} holds only weights and cannot be resumed: choose another train.run_dir, and set"
            f" train.init_from={path}"
        )
    numbers = stored["progress"]
    if not isinstance(numbers, dict):
        raise UserError(f"the progress in {path} ({numbers!r}) is malformed: go on from another checkpoint")
    state = TrainState.from_json(numbers)
    if step_name(state.step) != path.name:
        raise UserError(
            f"the progress in {path} ({numbers}) is of another step: go on from another checkpoint"
        )
    return state


def _counters(path: Path, stored: Mapping[str, Any]) -> dict[str, float | int]:
    counters = stored.get("engine")
    if (
        not isinstance(counters, dict)
        or not all(_is_number(value) for value in counters.values())
        or not COUNTERS.issuperset(counters)
        or "adam_step" not in counters
    ):
        raise UserError(
            f"the engine's state in {path} ({counters!r}) is malformed: go on from another checkpoint"
        )
    return dict(counters)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
