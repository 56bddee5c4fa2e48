"""A checkpoint of any layout loads into any other: the same bits by canonical name, the same losses afterwards."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.checkpoint.distributed.store import save_checkpoint
from megallama.checkpoint.format.boxes import build_boxes
from megallama.checkpoint.format.model_identity import model_identity
from megallama.checkpoint.format.protocol import step_name
from megallama.checkpoint.offline.reader import CheckpointReader
from tests.support.jobs import overrides
from tests.support.ranks import run_ranks

TOLERANCE = 1e-6
SAVED_STEP, LAST_STEP = 3, 6

SP = "parallel.sequence_parallel=true"
LAYOUTS = {
    "one rank": (1, ["zero.stage=0"]),
    "dp2 zero0": (2, ["zero.stage=0"]),
    "dp2 zero2 micro-batch of 2": (2, ["zero.stage=2", "train.micro_batch_size=2"]),
    "dp4 zero3": (4, ["zero.stage=3"]),
    "tp2 sp zero1": (2, ["parallel.tp=2", SP, "zero.stage=1"]),
    "pp2 uneven zero1": (2, ["parallel.pp=2", "parallel.layers_per_stage=[3,1]", "zero.stage=1"]),
    "pp2 vp2 zero2": (2, ["parallel.pp=2", "parallel.vp=2", "zero.stage=2"]),
    "cp2 zero3": (2, ["parallel.cp=2", "zero.stage=3"]),
    "tp2 pp2 zero1": (4, ["parallel.tp=2", "parallel.pp=2", "zero.stage=1"]),
    "dp2 pp2 zero3": (4, ["parallel.pp=2", "zero.stage=3"]),
    "dp2 tp2 sp pp2 zero2": (8, ["parallel.tp=2", "parallel.pp=2", SP, "zero.stage=2"]),
    "dp2 tp2 cp2 zero1": (8, ["parallel.tp=2", "parallel.cp=2", SP, "zero.stage=1"]),
    "dp2 zero1": (2, ["zero.stage=1"]),
    "dp2 zero2 offload": (2, ["zero.stage=2", "zero.offload=true"]),
}
OF_ALL_PAIRS = tuple(LAYOUTS)[:12]
TIED = ("one rank", "dp4 zero3", "tp2 sp zero1", "pp2 vp2 zero2", "tp2 pp2 zero1", "dp2 pp2 zero3")
COVERING = ("one rank", "cp2 zero3", "pp2 vp2 zero2", "tp2 pp2 zero1")
IN_BF16 = ("one rank", "dp2 zero1", "dp2 zero2 offload", "cp2 zero3", "tp2 pp2 zero1")
"""DeepSpeed has another optimizer, with other buffers, for nearly each of these."""


class Job:
    """One layout's rank: engine, loader and place of a run, taken apart."""

    def __init__(self, arguments: list[str]) -> None:
        from megallama.config.load import load_config
        from megallama.host.launch import read_launch_environment
        from megallama.topology.connect import connect
        from tests.support.builders import build_stage, engine_of, loader_of

        logging.disable(logging.WARNING)
        self.config = load_config(arguments)
        # Kept, for it takes the groups down when it goes.
        self._connection = connect(self.config.parallel, environment=read_launch_environment())
        self.topology = self._connection.__enter__()
        self.stage = build_stage(self.config, self.topology)
        self.engine = engine_of(self.config, self.topology, self.stage)
        self.loader = loader_of(self.config, self.topology)

    def train(self, *, begin: int, end: int) -> list[float]:
        """Losses of these steps."""
        return [self.engine.train_step(step, self.loader.batches(step)).loss for step in range(begin, end)]

    def save(self, run_dir: Path, *, step: int) -> None:
        """As training saves."""
        samples = step * self.config.train.global_batch_size
        progress = {
            "step": step,
            "consumed_samples": samples,
            "consumed_tokens": samples * self.config.train.seq_len,
        }
        save_checkpoint(
            run_dir / "checkpoints",
            step=step,
            tensors=build_boxes(self.engine.fragments(), self.engine.layout),
            state={
                "progress": progress,
                "engine": dict(self.engine.counters()),
                "data": self.loader.ledger(step),
            },
            model=model_identity(self.config.model),
            keep=0,
            group=self.topology.host_group,
        )

    def resume(self, run_dir: Path) -> int:
        """As training resumes, in an engine where nothing can be right by accident."""
        from megallama.trainer.resume import start_run
        from megallama.trainer.run_folder import RunFolder

        with torch.no_grad():
            for fragment in self.engine.fragments():
                for view in fragment.views.values():
                    view.fill_(math.nan)
            for parameter in self.stage.module.parameters():
                parameter.data.fill_(math.nan)
        folder = RunFolder(run_dir)
        state = start_run(
            folder,
            topology=self.topology,
            model=self.config.model,
            engine=self.engine,
            loader=self.loader,
            init_from=self.config.train.init_from,
            dtype=self.config.precision.dtype,
        )
        return state.step


def save_and_go_on(arguments: list[str], run_dir: Path) -> list[float]:
    """Train, save on the way, train on: the losses after the save."""
    job = Job(arguments)
    job.train(begin=0, end=SAVED_STEP)
    job.save(run_dir, step=SAVED_STEP)
    return job.train(begin=SAVED_STEP, end=LAST_STEP)


def load_each(arguments: list[str], pairs: list[tuple[Path, Path]]) -> list[list[float]]:
    """For each (source, copy): load the source, save what was loaded as the copy, train on; the losses."""
    job = Job(arguments)
    losses = []
    for source, copy in pairs:
        assert job.resume(source) == SAVED_STEP
        job.save(copy, step=SAVED_STEP)
        losses.append(job.train(begin=SAVED_STEP, end=LAST_STEP))
    return losses


@dataclasses.dataclass
class Matrix:
    """Layouts that have saved, and the proof that others load what they saved."""

    folder: Path
    extra: list[str]
    names: tuple[str, ...]
    tolerance: float = TOLERANCE
    losses: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def save_all(self) -> None:
        """Every layout saves once."""
        for name in self.names:
            self.losses[name] = self._run(name, save_and_go_on, self.run_dir(name))

    def prove(self, target: str, sources: tuple[str, ...]) -> None:
        """`target` loads what each of `sources` saved."""
        pairs = [(self.run_dir(source), self.run_dir(f"{source} in {target}")) for source in sources]
        for source, (saved, copy), losses in zip(
            sources, pairs, self._run(target, load_each, pairs), strict=True
        ):
            what = f"{source} -> {target}"
            assert unequal_tensors(saved, copy) == [], what
            wanted = self.losses[source]
            if source == target:
                assert losses == wanted, what
            else:
                errors = [abs(got - want) / want for got, want in zip(losses, wanted, strict=True)]
                assert max(errors) <= self.tolerance, (what, losses, wanted)

    def _run(self, name: str, function: Any, argument: Any) -> Any:
        world_size, words = LAYOUTS[name]
        steps = f"train.steps={LAST_STEP}"
        arguments = overrides(self.folder, steps, *words, *self.extra, run_name="unused")
        return run_ranks(world_size, function, arguments, argument, timeout_s=1500)[0]

    def run_dir(self, name: str) -> Path:
        return self.folder / name.replace(" ", "-")


def unequal_tensors(a: Path, b: Path) -> list[str]:
    """Keys whose tensors are not bit for bit the same in the checkpoints of two runs."""
    readers = [CheckpointReader(path / "checkpoints" / step_name(SAVED_STEP)) for path in (a, b)]
    assert readers[0].keys == readers[1].keys and len(readers[0].kinds) == 3
    assert readers[0].state == readers[1].state
    pairs = {key: [reader.read(key).view(torch.int32) for reader in readers] for key in readers[0].keys}
    assert all(torch.count_nonzero(one) for key, (one, _) in pairs.items() if key.startswith("exp_avg_sq/"))
    return [key for key, (one, other) in pairs.items() if not torch.equal(one, other)]


def closeness(a: Path, b: Path) -> float:
    """Largest difference of a master weight in the checkpoints of two runs."""
    one, other = (CheckpointReader(path / "checkpoints" / step_name(SAVED_STEP)) for path in (a, b))
    return max(float((one.read(f"fp32/{n}") - other.read(f"fp32/{n}")).abs().max()) for n in one.names())


def prove_ring(matrix: Matrix) -> None:
    matrix.save_all()
    for source, target in zip(matrix.names, (*matrix.names[1:], matrix.names[0]), strict=True):
        matrix.prove(target, (source,))


def test_a_ring_of_layouts(tmp_path: Path) -> None:
    """Each loads what the one before it saved; `test_all_ordered_pairs` has the others."""
    prove_ring(Matrix(tmp_path, ["model.tie_embeddings=true"], COVERING))


@pytest.mark.long
def test_a_ring_of_layouts_in_bf16(tmp_path: Path) -> None:
    """Master weights and moments to the bit; losses as near as layouts come in bf16."""
    prove_ring(Matrix(tmp_path, ["precision.dtype=bf16"], IN_BF16, tolerance=2e-3))


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("is_tied", [False, True])
def test_all_ordered_pairs(tmp_path: Path, is_tied: bool) -> None:
    names = TIED if is_tied else OF_ALL_PAIRS
    matrix = Matrix(tmp_path, [f"model.tie_embeddings={str(is_tied).lower()}"], names)
    matrix.save_all()
    for name in names[1:]:
        assert closeness(matrix.run_dir(names[0]), matrix.run_dir(name)) < 1e-5, name
    for target in names:
        matrix.prove(target, names)
