"""The output of `megallama verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megallama.metrics.traffic_meter import Traffic
from megallama.verification.compare import GRAD_NORM, LOSS
from megallama.verification.job import GRADIENT, PARAMETER
from megallama.verification.layouts import Layout


@dataclass(frozen=True)
class LayoutResult:
    """The verdict on one layout."""

    layout: Layout
    world_size: int
    is_equal: bool
    errors: dict[str, float]
    """By quantity; empty where the ranks failed."""
    worst: dict[str, str]
    """Name of the tensor with the largest error, for gradient and parameter."""
    cause: str
    """Likely cause of a difference, or the error that ended the ranks; empty when equal."""
    traffic: Traffic
    """Bytes of one step, summed over the ranks."""
    predicted_traffic: Traffic | None
    """The same by the formulas of `plan/traffic.py`; None where there are none, or the ranks failed."""
    seconds: float


def name_width(layouts: Sequence[Layout]) -> int:
    """Width of the table's first column: that of the longest name."""
    return max(len("layout"), *(len(layout.name) for layout in layouts))


def header(*, name: str, steps: int, dtype: str, width: int) -> str:
    """Title and head of the table."""
    return (
        f"{name}: {steps} steps in {dtype}, each layout against one process (relative errors)\n"
        f"{'layout':<{width}} {'ranks':>5} {'loss':>8} {'norm':>8} {'gradient':>8} {'weights':>8}  verdict"
    )


def row(result: LayoutResult, *, width: int) -> str:
    """One line, and one more with the cause where it differs."""
    cells = [
        f"{result.errors[q]:8.1e}" if q in result.errors else f"{'-':>8}"
        for q in (LOSS, GRAD_NORM, GRADIENT, PARAMETER)
    ]
    verdict = "equal" if result.is_equal else "DIFFERS" if result.errors else "FAILED"
    begin = f"{result.layout.name:<{width}} {result.world_size:>5} {' '.join(cells)}"
    text = f"{begin}  {verdict} ({result.seconds:.0f} s)"
    if not result.is_equal:
        for kind, key in result.worst.items():
            text += f"\n    worst {kind}: {key}"
        text += f"\n    {result.cause}"
    return text


def traffic_rows(result: LayoutResult) -> str:
    """Bytes of one step of a layout, one line for each group, operation and format."""
    lines = [f"{result.layout.name}: bytes of one step, all ranks"]
    for (group, operation, dtype), count in sorted(result.traffic.items()):
        lines.append(f"    {group:<12} {operation:<15} {dtype:<9} {count:>15,}")
    return "\n".join(lines)


def summary(results: Sequence[LayoutResult]) -> str:
    """The last line."""
    wrong = [result.layout.name for result in results if not result.is_equal]
    seconds = sum(result.seconds for result in results)
    if not wrong:
        return f"all {len(results)} layouts equal one process ({seconds:.0f} s)"
    return f"{len(wrong)} of {len(results)} layouts differ from one process: {'; '.join(wrong)}"
