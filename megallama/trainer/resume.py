"""Starts a run: from its newest intact checkpoint, from the weights of another run, or from scratch."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megallama.batches.loader import Loader
from megallama.checkpoint.distributed.store import load_checkpoint
from megallama.checkpoint.format.boxes import build_boxes
from megallama.checkpoint.format.integrity import intact_checkpoint, latest_checkpoint
from megallama.checkpoint.format.model_identity import model_differences, model_identity
from megallama.checkpoint.format.protocol import read_manifest, step_name
from megallama.config.same_model import WITHOUT_WEIGHTS
from megallama.config.schema import Dtype, ModelConfig, ParallelConfig, PrecisionConfig, ZeroConfig
from megallama.engine.build import Engine
from megallama.host.errors import UserError
from megallama.huggingface.weights import load_hugging_face
from megallama.topology.agreement import Ranks
from megallama.topology.groups import Topology
from megallama.trainer.finite import not_finite
from megallama.trainer.init_from import is_hugging_face_source
from megallama.trainer.run_folder import RunFolder
from megallama.trainer.state import TrainState

log = logging.getLogger(__name__)


COUNTERS = {"adam_step", "loss_scale", "loss_scale_iteration", "loss_scale_last_overflow"}


def start_run(
    folder: RunFolder,
    *,
    topology: Topology,
    model: ModelConfig,
    engine: Engine,
    loader: Loader,
    init_from: str | None,
    dtype: Dtype,
) -> TrainState:
    """Fill the engine and set the loader to its place; the progress that the run begins with.

    The newest checkpoint of the run folder that verifies is resumed from; damaged ones are named in the log. Where
    there is none, `init_from` gives the weights, with a fresh optimizer, from step 0.

    Raises:
        UserError: checkpoints are there and none can be used, or one is of another model, or holds no finite numbers.
    """
    path = latest_checkpoint(folder.checkpoints, log=log.warning, group=topology.host_group)
    if path is not None:
        if init_from is not None:
            log.info("train.init_from (%s) is not used: the run has checkpoints of its own", init_from)
        state = _resume(path, topology=topology, model=model, engine=engine, loader=loader)
        remedy = f"move {path} away, and the run goes on from an older checkpoint or begins anew"
        _check_finite(path, engine, topology=topology, dtype=dtype, remedy=remedy)
        return state
    if init_from is not None:
        path = _take_weights(Path(init_from), topology=topology, model=model, engine=engine)
        remedy = "choose another train.init_from"
        _check_finite(path, engine, topology=topology, dtype=dtype, remedy=remedy)
    return TrainState()


def _check_finite(path: Path, engine: Engine, *, topology: Topology, dtype: Dtype, remedy: str) -> None:
    tensors = build_boxes(engine.fragments(), engine.layout)
    fault = not_finite(tensors, dtype=dtype, group=topology.host_group)
    if fault is not None:
        raise UserError(f"{path} cannot be trained on in {dtype.value} ({fault}): {remedy}")


def describe_layout(
    topology: Topology, *, parallel: ParallelConfig, zero: ZeroConfig, precision: PrecisionConfig
) -> dict[str, Any]:
    """How the run that writes a checkpoint is cut: for people, a load needs none of it."""
    grid = topology.grid
    sizes = {"ranks": topology.world_size, "dp": grid.dp, "tp": grid.tp, "pp": grid.pp, "cp": grid.cp}
    return {
        **sizes,
        "vp": parallel.vp,
        "zero": zero.stage,
        "dtype": precision.dtype.value,
    }


def _resume(
    path: Path, *, topology: Topology, model: ModelConfig, engine: Engine, loader: Loader
) -> TrainState:
    group = topology.host_group
    stored = Ranks(group).first(lambda: read_manifest(path).state)
    state, counters = _progress(path, stored), _counters(path, stored)
    record = stored.get(loader.record_name)
    if record is None and loader.is_traceable:
        log.warning("%s has no record of consumed data: every source begins a new epoch", path)
    loader.resume(record, step=state.step, consumed_samples=state.consumed_samples)
    load_checkpoint(
        path,
        tensors=build_boxes(engine.fragments(), engine.layout),
        model=model_identity(model),
        group=group,
    )
    engine.restore(counters)
    log.info("resumed from %s at step %d", path, state.step)
    return state


def _take_weights(source: Path, *, topology: Topology, model: ModelConfig, engine: Engine) -> Path:
    group, path = topology.host_group, source
    tensors = build_boxes(engine.fragments(), engine.layout)
    identity = model_identity(model)
    if Ranks(group).first(lambda: is_hugging_face_source(source)):
        there = load_hugging_face(source, tensors=tensors, model=model, group=group)
    else:
        path = intact_checkpoint(source, log=log.warning, group=group)
        load_checkpoint(
            path, tensors=tensors, model=identity, kind="fp32", may_differ=WITHOUT_WEIGHTS, group=group
        )
        there = Ranks(group).first(lambda: read_manifest(path).model)
    engine.restore(engine.counters())
    log.info("weights from %s, fresh optimizer", path)
    differences = model_differences(there, identity)
    if differences and topology.rank == 0:
        log.warning(
            "the weights of %s were trained with other settings than this run's (%s)",
            path,
            "; ".join(differences),
        )
    return path


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
