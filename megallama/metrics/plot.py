"""Plots the loss curve of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from megallama.host.errors import UserError
from megallama.metrics.jsonl import METRICS_FILE, STEP, load_metrics

TRAIN, VALIDATION, LEVEL = "#3b6fb6", "#d1495b", "#6b6b6b"


def plot_loss(run_dir: Path, output_png: Path, *, unigram_loss: float | None = None) -> None:
    """Draw training loss, smoothed training loss and validation loss over steps.

    Args:
        run_dir: Holds metrics.jsonl.
        output_png: The picture, replaced if it exists.
        unigram_loss: Level to mark, in nats a token: what guessing by frequency alone would reach.

    Raises:
        UserError: no step is recorded in `run_dir`.
    """
    rows = load_metrics(run_dir / METRICS_FILE) if (run_dir / METRICS_FILE).is_file() else []
    train = _points(rows, "train/loss")
    validation = _points(rows, "eval/loss")
    if not train:
        raise UserError(
            f"no training loss to plot ({run_dir / METRICS_FILE}): name the folder of a run that has begun"
        )

    # Imported here: it takes a moment. The Figure is made without pyplot, so there is no window and no state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = zip(*train, strict=True)
    axes.plot(steps, losses, color=TRAIN, alpha=0.3, linewidth=1, marker="." if len(train) == 1 else None)
    axes.plot(
        steps, smoothed(losses), color=TRAIN, linewidth=1.8, label="training (smoothed; each step faint)"
    )
    if validation:
        steps, losses = zip(*validation, strict=True)
        label = f"validation (last {losses[-1]:.3f})"
        axes.plot(steps, losses, color=VALIDATION, marker="o", markersize=4, linewidth=1.2, label=label)
    if unigram_loss is not None:
        label = f"unigram level ({unigram_loss:.3f})"
        axes.axhline(unigram_loss, color=LEVEL, linestyle="--", linewidth=1.2, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(output_png, format="png")


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential mean over about 2% of the curve, free of the start's bias."""
    decay = 1.0 - 1.0 / max(1.0, len(values) / 50)
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean = decay * mean + (1.0 - decay) * value
        weight = decay * weight + (1.0 - decay)
        out.append(mean / weight)
    return out


def _points(rows: Sequence[dict[str, float]], key: str) -> list[tuple[float, float]]:
    return [(row[STEP], row[key]) for row in rows if key in row and math.isfinite(row[key])]
