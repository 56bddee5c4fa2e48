"""Verifies that the layouts of a run compute what one process computes, on CPU ranks of this machine."""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megallama.config.schema import RunConfig
from megallama.grid import Grid
from megallama.host.errors import ConfigError, UserError
from megallama.host.ranks import RankFailedError, run_ranks
from megallama.plan.traffic import Traffic, step_traffic
from megallama.verification.compare import GRAD_NORM, LOSS, QUANTITIES, Comparison, compare
from megallama.verification.diagnose import Tolerances, is_equal, likely_cause
from megallama.verification.job import GRADIENT, PARAMETER, RankReport, run_rank
from megallama.verification.layouts import Layout, change, problems_of
from megallama.verification.report import LayoutResult
from megallama.verification.shrink import shrink
from megallama.verification.synthetic import write_tokens

TOLERANCES: dict[str, Tolerances] = {
    "fp64": {LOSS: 1e-10, GRAD_NORM: 1e-10, GRADIENT: 1e-10, PARAMETER: 1e-9},
    "fp32": {LOSS: 1e-6, GRAD_NORM: 1e-6, GRADIENT: 1e-5, PARAMETER: 1e-4},
}
"""Largest relative errors. bf16 has none of its own: see `LOW_PRECISION_MARGIN`."""

LOW_PRECISION_MARGIN = 3.0
"""In bf16 a layout may be as far from one process in fp32 as this times one process in bf16 is.

A loss is one number, and how far rounding moves it is a draw: one process is run with each of the kernels that compute
the same with other roundings, and the farthest counts.
"""
LOW_PRECISION_DRAWS = tuple(
    {"kernels.attention": attention, "kernels.norm": norm}
    for attention in ("sdpa", "reference")
    for norm in ("torch", "reference")
)

FAR = 1e-30
"""Errors below this do not set a tolerance of 0."""

ONE_PROCESS = Layout("one process", 1, ())

RANKS_TIMEOUT_S = 1800.0
"""For ranks that wait for each other; never reached by those that only share their cores with too many others."""

MOST_SHOWN = 3
"""Broken invariants that are shown."""


def verify(
    config: RunConfig,
    layouts: Sequence[Layout],
    *,
    steps: int = 5,
    dtype: str = "fp64",
    before: Callable[[], None] | None = None,
) -> Iterator[LayoutResult]:
    """The verdict on each layout, as it is found.

    Args:
        config: The run, in full size.
        layouts: How to cut it; each must be legal for it.
        steps: Optimizer steps.
        dtype: fp64 tells every bug from rounding; fp32 and bf16 run the code of training as it is.
        before: Called first in every rank of a layout, not in the reference's; the tests plant bugs with it.

    Raises:
        UserError: a layout that the run cannot have, with the reason.
    """
    if steps < 1:
        raise UserError(f"--steps ({steps}) must be at least 1: 5 are usual")
    check_layouts(config, layouts)
    groups = _alike(config, layouts)
    _check_small(config, groups, steps=steps)
    for group in groups:
        with tempfile.TemporaryDirectory(prefix="megallama-verify-") as folder:
            bench = Bench(config, group, steps=steps, dtype=dtype, folder=Path(folder))
            for layout in group:
                yield bench.verify(layout, before=before)


def check_layouts(config: RunConfig, layouts: Sequence[Layout]) -> None:
    """Raise ConfigError with every reason why a layout cannot be; a batch that does not fit is none."""
    problems = []
    for layout in layouts:
        cut = layout.apply(config)
        per_pass = cut.train.micro_batch_size * layout.dp
        cut = change(cut, {"train.global_batch_size": per_pass * max(2, 2 * cut.parallel.pp)})
        found = problems_of(cut, world_size=layout.world_size(cut))
        problems += [f"layout {layout.name}: {problem}" for problem in found]
    if problems:
        raise ConfigError(problems)


def _check_small(config: RunConfig, groups: Sequence[Sequence[Layout]], *, steps: int) -> None:
    """Raise ConfigError where a layout's own settings do not fit the sizes that the small run has."""
    problems = []
    for group in groups:
        small = _small_run(config, group, steps=steps)
        for layout in group:
            cut = layout.apply(small)
            found = problems_of(cut, world_size=layout.world_size(cut))
            problems += [f"layout {layout.name}, made small: {problem}" for problem in found]
    if problems:
        raise ConfigError(problems)


def _small_run(config: RunConfig, group: Sequence[Layout], *, steps: int) -> RunConfig:
    return change(shrink(config, group, steps=steps), dict(_model_settings(group[0])))


def _alike(config: RunConfig, layouts: Sequence[Layout]) -> list[list[Layout]]:
    """Layouts that one small model can serve without being large for some: as many chunks, as large a batch."""
    groups: dict[Any, list[Layout]] = {}
    for layout in layouts:
        cut = layout.apply(config)
        parallel = cut.parallel
        batch = 2 * parallel.pp * layout.dp * cut.train.micro_batch_size
        odd = tuple(size // (size & -size) for size in (parallel.tp, parallel.cp))
        chunks = (parallel.pp * parallel.vp, tuple(parallel.layers_per_stage))
        groups.setdefault((chunks, batch, odd, str(_model_settings(layout))), []).append(layout)
    return list(groups.values())


def _model_settings(layout: Layout) -> tuple[Any, ...]:
    """Settings that change what is computed, not how: one process must have them too."""
    return tuple((k, v) for k, v in layout.settings if k.partition(".")[0] in ("model", "data", "optim"))


class Bench:
    """A small run, its data, and the reference tensors of one process."""

    def __init__(
        self, config: RunConfig, layouts: Sequence[Layout], *, steps: int, dtype: str, folder: Path
    ) -> None:
        self._folder = folder
        self._dtype = dtype
        small = _small_run(config, layouts, steps=steps)
        sequences = small.train.global_batch_size * (steps + 1)
        write_tokens(
            folder / "tokens",
            num_tokens=small.train.seq_len * sequences,
            vocab_size=small.model.vocab_size,
            seq_len=small.train.seq_len,
            seed=small.train.seed,
        )
        self._small = change(
            small,
            {
                "data.sources": [str(folder / "tokens")],
                "train.run_dir": str(folder),
                "precision.dtype": dtype,
            },
        )
        self._reference_file = folder / "reference.pt"
        self._reference = self._run_reference("fp32" if dtype == "bf16" else dtype)
        self._tolerances = TOLERANCES.get(dtype) or self._low_precision_tolerances()

    @property
    def global_batch_size(self) -> int:
        """Sequences of a step of the small run."""
        return self._small.train.global_batch_size

    def verify(self, layout: Layout, *, before: Callable[[], None] | None) -> LayoutResult:
        """Run one layout and compare it."""
        started = time.monotonic()
        config = layout.apply(self._small)
        world_size = layout.world_size(config)
        problems = problems_of(config, world_size=world_size)
        assert not problems, f"the shrunk model does not fit layout {layout.name}: {problems}"
        job = partial(run_rank, config, reference=self._reference_file, before=before)
        try:
            reports = run_ranks(world_size, job, timeout_s=RANKS_TIMEOUT_S)
        except (RankFailedError, TimeoutError) as error:
            last = str(error).strip().splitlines()[-1]
            seconds = time.monotonic() - started
            return LayoutResult(layout, world_size, False, {}, {}, last, {}, None, seconds)
        found = self._compare(reports)
        equal = is_equal(found, self._tolerances)
        return LayoutResult(
            layout=layout,
            world_size=world_size,
            is_equal=equal,
            errors=found.errors,
            worst={kind: f"{part.key} on rank {part.rank}" for kind, part in found.worst.items()},
            cause="" if equal else self._cause(found, config, layout),
            traffic=found.traffic(),
            predicted_traffic=_predicted_traffic(config, world_size=world_size),
            seconds=time.monotonic() - started,
        )

    def _cause(self, found: Comparison, config: RunConfig, layout: Layout) -> str:
        cause = likely_cause(found, config, dp=layout.dp, tolerances=self._tolerances)
        if not found.broken:
            return cause
        first, *rest = found.broken.splitlines()
        more = [f"  - and {len(rest) - MOST_SHOWN} more"] if len(rest) > MOST_SHOWN else []
        return "\n    ".join([cause, first, *rest[:MOST_SHOWN], *more])

    def _run_reference(self, dtype: str) -> RankReport:
        """One process with plain kernels, the whole batch in one forward, nothing sharded or recomputed."""
        config = change(
            ONE_PROCESS.apply(self._small),
            {
                "precision.dtype": dtype,
                "zero.stage": 1,
                "train.micro_batch_size": self._small.train.global_batch_size,
                "train.recompute": "none",
                "kernels.attention": "reference",
                "kernels.norm": "reference",
                "kernels.adam": "reference",
            },
        )
        job = partial(run_rank, config, save=self._reference_file)
        (report,) = run_ranks(1, job, timeout_s=RANKS_TIMEOUT_S)
        return report

    def _low_precision_tolerances(self) -> Tolerances:
        config = ONE_PROCESS.apply(self._small)
        draws = []
        for kernels in LOW_PRECISION_DRAWS:
            job = partial(run_rank, change(config, kernels), reference=self._reference_file)
            draws.append(self._compare(run_ranks(1, job, timeout_s=RANKS_TIMEOUT_S)).errors)
        return {
            quantity: LOW_PRECISION_MARGIN * max(FAR, *(errors[quantity] for errors in draws))
            for quantity in QUANTITIES
        }

    def _compare(self, reports: Sequence[RankReport]) -> Comparison:
        return compare(reports, self._reference, keys=self._reference.keys)


def _predicted_traffic(config: RunConfig, *, world_size: int) -> Traffic | None:
    parallel = config.parallel
    grid = Grid.from_world_size(world_size, tp=parallel.tp, cp=parallel.cp, pp=parallel.pp)
    total: Counter[tuple[str, str, str]] = Counter()
    try:
        for rank in range(world_size):
            total.update(step_traffic(config, grid=grid, place=grid.coordinates(rank)))
    except UserError:
        return None  # ZeRO 3 with stages
    return dict(total)


def default_layouts(config: RunConfig) -> list[Layout]:
    """The experiment's own layout with every axis cut down to 2, and each of its axes alone."""
    parallel, zero = config.parallel, config.zero.stage
    axes = {axis: 2 for axis in ("tp", "cp", "pp") if getattr(parallel, axis) > 1}
    rest = {"parallel.vp": min(2, parallel.vp), "parallel.sequence_parallel": parallel.sequence_parallel}

    def layout(sizes: dict[str, int], dp: int) -> Layout:
        settings = {f"parallel.{axis}": size for axis, size in sizes.items()}
        if "pp" in sizes:
            settings["parallel.vp"] = rest["parallel.vp"]
        if "tp" in sizes:
            settings["parallel.sequence_parallel"] = rest["parallel.sequence_parallel"]
        words = [f"{axis}={size}" for axis, size in sizes.items()] + ([f"dp={dp}"] if dp > 1 else [])
        return Layout(",".join([*words, f"zero={zero}"]), dp, (*settings.items(), ("zero.stage", zero)))

    found = [layout({axis: size}, 1) for axis, size in axes.items()]
    found.append(layout({}, 2))
    if axes:
        found.append(layout(axes, 2 if math.prod(axes.values()) <= 4 else 1))
    return found
