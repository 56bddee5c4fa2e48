"""What each rank does in a verification: a few steps through the real code, compared with stored tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megallama.checkpoint.format.boxes import BoxedTensor, build_boxes
from megallama.config.schema import OptimConfig, RunConfig
from megallama.engine.build import Engine, build_run_engine
from megallama.engine.invariants import InvariantError
from megallama.engine.step import StepResult
from megallama.grid import Coordinates
from megallama.host.launch import read_launch_environment
from megallama.metrics.traffic_meter import Traffic, TrafficMeter
from megallama.stream.build import build_loader
from megallama.topology.connect import connect
from megallama.verification.synthetic import with_uneven_mask

GRADIENT, PARAMETER = "gradient", "parameter"
"""What is compared: the gradient of the first step, the weights after the last."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """One rank's part of a canonical tensor against the reference."""

    kind: str
    """GRADIENT or PARAMETER."""
    key: str
    """Canonical name."""
    rank: int
    """Who holds the part."""
    error: float
    """Largest absolute difference over the largest absolute value of the whole reference tensor."""
    ratio: float
    """The factor by which the reference part comes closest to this one."""
    rest: float
    """`error` that is left after that factor."""
    elements: int
    """Size of the part."""
    total: int
    """Size of the whole tensor."""


@dataclasses.dataclass(frozen=True)
class RankReport:
    """What one rank saw."""

    place: Coordinates
    steps: list[StepResult]
    differences: list[Difference]
    traffic: Traffic
    """Bytes of one step after the first."""
    keys: tuple[str, ...]
    """Canonical names of the parameters that this rank holds a part of."""
    broken: str
    """The first invariant that did not hold, the same on every rank; empty: all did."""


def run_rank(
    config: RunConfig,
    *,
    reference: Path | None = None,
    save: Path | None = None,
    before: Callable[[], None] | None = None,
) -> RankReport:
    """Train `config.train.steps` steps in this rank of a started job.

    Args:
        config: The shrunk run, cut over the ranks.
        reference: File of canonical tensors to compare with.
        save: File to write the canonical tensors to; for one rank only.
        before: Called first; the tests plant bugs with it.
    """
    if before is not None:
        before()
    environment = read_launch_environment()
    torch.set_num_threads(1)
    with connect(config.parallel, environment=environment) as topology:
        engine = build_run_engine(config, topology)
        loader = build_loader(
            config.data,
            topology=topology,
            train=config.train,
            evaluation=config.eval,
            vocab_size=config.model.vocab_size,
        )
        meter = TrafficMeter(topology)
        steps: list[StepResult] = []
        gradients: dict[str, BoxedTensor] = {}
        broken = ""
        for step in range(config.train.steps):
            batches = with_uneven_mask(loader.batches(step))
            broken = broken or _broken_invariants(engine, step)
            with meter:
                steps.append(engine.train_step(step, batches))
            if step == 0:
                gradients = _first_gradients(engine, config.optim, steps[0].grad_norm)
            if step == min(1, config.train.steps - 1):
                traffic = meter.take()
            meter.take()
        loader.close()
        parameters = dict(_canonical(engine, "fp32"))
        held = {GRADIENT: gradients, PARAMETER: parameters}
        if save is not None:
            torch.save(
                {f"{kind}/{k}": _whole(t) for kind, part in held.items() for k, t in part.items()}, save
            )
        differences: list[Difference] = []
        if reference is not None:
            wanted = torch.load(reference, weights_only=True, mmap=True)
            for kind, part in held.items():
                for key, tensor in part.items():
                    differences.append(_compare(kind, key, topology.rank, tensor, wanted[f"{kind}/{key}"]))
        return RankReport(
            topology.grid.coordinates(topology.rank), steps, differences, traffic, tuple(parameters), broken
        )


def _broken_invariants(engine: Engine, step: int) -> str:
    try:
        engine.check_invariants(step)
    except InvariantError as error:
        return str(error)
    return ""


def _canonical(engine: Engine, kind: str) -> Iterator[tuple[str, BoxedTensor]]:
    """Boxes of one kind by canonical name; copies on other ranks count as well, so that each is compared."""
    fragments = (dataclasses.replace(fragment, is_written=True) for fragment in engine.fragments())
    layout = {
        name: tuple(dataclasses.replace(piece, is_owner=True) for piece in pieces)
        for name, pieces in engine.layout.items()
    }
    for key, tensor in build_boxes(fragments, layout, cap_elements=None).items():
        if key.startswith(f"{kind}/"):
            yield key.removeprefix(f"{kind}/"), tensor


def _first_gradients(engine: Engine, optim: OptimConfig, grad_norm: float) -> dict[str, BoxedTensor]:
    """The gradient of the step just taken, by canonical name.

    After one step Adam's first moment is (1 - beta1) x the clipped gradient, under every ZeRO stage and in the
    same place as the weights; DeepSpeed clips by (norm + 1e-6) / clip where that is above 1.
    """
    clip = max(1.0, (grad_norm + 1e-6) / optim.clip) if optim.clip and math.isfinite(grad_norm) else 1.0
    factor = clip / (1.0 - optim.beta1)
    return {
        key: dataclasses.replace(
            tensor, boxes={place: box.double() * factor for place, box in tensor.boxes.items()}
        )
        for key, tensor in _canonical(engine, "exp_avg")
    }


def _whole(tensor: BoxedTensor) -> torch.Tensor:
    whole = torch.full(tensor.global_shape, math.nan, dtype=torch.float64)
    for place, box in tensor.boxes.items():
        whole[_slices(place, box)] = box.double()
    assert not whole.isnan().any() or any(box.isnan().any() for box in tensor.boxes.values()), tensor.key
    return whole


def _slices(place: tuple[int, ...], box: torch.Tensor) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(place, box.shape, strict=True))


def _compare(kind: str, key: str, rank: int, tensor: BoxedTensor, wanted: torch.Tensor) -> Difference:
    scale = float(wanted.abs().max()) or 1.0
    got_parts = [box.double().flatten() for box in tensor.boxes.values()]
    wanted_parts = [wanted[_slices(place, box)].flatten() for place, box in tensor.boxes.items()]
    got, part = torch.cat(got_parts), torch.cat(wanted_parts)
    square = float(part @ part)
    ratio = float(got @ part) / square if square else 1.0
    return Difference(
        kind=kind,
        key=key,
        rank=rank,
        error=_largest(got - part) / scale,
        ratio=ratio,
        rest=_largest(got - ratio * part) / scale / max(abs(ratio), 1e-30),
        elements=got.numel(),
        total=wanted.numel(),
    )


def _largest(difference: torch.Tensor) -> float:
    """Largest absolute value; infinite where one is no number."""
    value = float(difference.abs().max())
    return value if math.isfinite(value) else math.inf
