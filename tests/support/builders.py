"""The builders with all sections of a run, for tests that take one apart."""

from __future__ import annotations

from megallama.batches.micro_batch import RankPart
from megallama.config.schema import RunConfig
from megallama.engine.build import Engine, build_engine
from megallama.model.build import Stage, build_model
from megallama.stream.build import build_loader
from megallama.stream.loader import DataLoader, open_loader
from megallama.topology.groups import Topology


def build_stage(config: RunConfig, topology: Topology, *, is_initialized: bool = True) -> Stage:
    """This rank's stage of a run."""
    return build_model(
        config.model,
        topology=topology,
        parallel=config.parallel,
        precision=config.precision,
        train=config.train,
        kernels=config.kernels,
        is_initialized=is_initialized,
    )


def engine_of(config: RunConfig, topology: Topology, stage: Stage) -> Engine:
    """The engine of a run on this rank, over a stage that the test holds; `build_run_engine` builds both."""
    return build_engine(
        stage,
        topology=topology,
        zero=config.zero,
        precision=config.precision,
        optim=config.optim,
        train=config.train,
        kernels=config.kernels,
    )


def loader_of(config: RunConfig, topology: Topology) -> DataLoader:
    """The loader of a run on this rank."""
    return build_loader(
        config.data,
        topology=topology,
        train=config.train,
        evaluation=config.eval,
        vocab_size=config.model.vocab_size,
    )


def part_loader(config: RunConfig, **part: int) -> DataLoader:
    """The loader of a run for one part of each step, without a process group."""
    return open_loader(
        config.data,
        train=config.train,
        vocab_size=config.model.vocab_size,
        evaluation=config.eval,
        part=RankPart(cp_size=config.parallel.cp, **part),
    )
