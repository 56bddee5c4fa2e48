"""Compares the reports of a layout's ranks with one process: how large the differences are, and where."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from megallama.engine.step import StepResult
from megallama.metrics.traffic_meter import Traffic
from megallama.verification.job import GRADIENT, PARAMETER, Difference, RankReport

LOSS, GRAD_NORM = "loss", "gradient norm"

QUANTITIES = (LOSS, GRAD_NORM, GRADIENT, PARAMETER)
"""What has an error and a tolerance."""


@dataclass(frozen=True)
class Comparison:
    """A layout against one process. Errors are relative; see `Difference.error` for tensors."""

    errors: dict[str, float]
    """Largest error of each of QUANTITIES over steps, tensors and ranks."""
    worst: dict[str, Difference]
    """The tensor part with the largest error, for GRADIENT and PARAMETER."""
    step_errors: list[tuple[float, float]]
    """Error of loss and gradient norm, step by step."""
    first_ratios: tuple[float, float]
    """Loss and gradient norm of the first step as multiples of one process's."""
    reports: list[RankReport]
    """What the ranks said."""
    missing: list[str] = field(default_factory=list)
    """Canonical tensors that no rank, or not enough of them, holds."""

    @property
    def broken(self) -> str:
        """The first invariant that did not hold; empty: all did."""
        return self.reports[0].broken

    def parts(self, kind: str) -> list[Difference]:
        """All tensor parts of one kind."""
        return [d for report in self.reports for d in report.differences if d.kind == kind]

    def traffic(self) -> Traffic:
        """Bytes of the second step, summed over the ranks."""
        total: Traffic = defaultdict(int)
        for report in self.reports:
            for key, count in report.traffic.items():
                total[key] += count
        return dict(total)


def compare(reports: Sequence[RankReport], reference: RankReport, *, keys: Sequence[str]) -> Comparison:
    """The reports of a layout's ranks against that of one process.

    Args:
        reports: In rank order, made with the reference's tensors.
        reference: One process.
        keys: Canonical names that must be there.
    """
    step_errors = [
        (
            max(_relative(report.steps[i].loss, wanted.loss) for report in reports),
            max(_relative(report.steps[i].grad_norm, wanted.grad_norm) for report in reports),
        )
        for i, wanted in enumerate(reference.steps)
    ]
    worst: dict[str, Difference] = {}
    missing = []
    for kind in (GRADIENT, PARAMETER):
        parts = [d for report in reports for d in report.differences if d.kind == kind]
        if parts:
            worst[kind] = max(parts, key=lambda d: d.error)
        held: dict[str, int] = defaultdict(int)
        for part in parts:
            held[part.key] += part.elements
        totals = {part.key: part.total for part in parts}
        missing += [f"{kind} of {key}" for key in keys if held[key] < totals.get(key, 1)]
    first, wanted = reports[0].steps[0], reference.steps[0]
    return Comparison(
        errors={
            LOSS: max(loss for loss, _ in step_errors),
            GRAD_NORM: max(norm for _, norm in step_errors),
            **{kind: part.error for kind, part in worst.items()},
        },
        worst=worst,
        step_errors=step_errors,
        first_ratios=_ratios(first, wanted),
        reports=list(reports),
        missing=missing,
    )


def _ratios(got: StepResult, wanted: StepResult) -> tuple[float, float]:
    return got.loss / (wanted.loss or 1.0), got.grad_norm / (wanted.grad_norm or 1.0)


def _relative(got: float, wanted: float) -> float:
    error = abs(got - wanted) / (abs(wanted) or 1.0)
    return error if math.isfinite(error) else math.inf
