"""Console output of a run: one live line on a terminal, plain lines elsewhere.

Speed and MFU are smoothed here, for the eye; every sink gets the numbers as they were measured.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from megallama.metrics.meter import Facts

REFRESH_S = 0.1
SMOOTHING = 0.1
SMOOTHED = ("perf/tokens_per_s", "perf/mfu")
BAR_WIDTH = 20
MIN_BAR_WIDTH = 5


class ConsoleSink:
    """Shows steps and evaluations."""

    def __init__(
        self,
        *,
        steps: int,
        first_step: int,
        interval: int,
        is_terminal: bool,
        facts: Facts,
        stream: TextIO | None = None,
    ) -> None:
        """Print the heading of the run.

        Args:
            steps: Optimizer steps of the whole run.
            first_step: Completed steps at the start.
            interval: Steps between plain lines; a terminal shows every step.
            is_terminal: Whether to show a live line.
            facts: From `meter.build_meter`.
            stream: Where to write; standard output by default.
        """
        self._steps = steps
        self._interval = max(1, interval)
        self._facts = facts
        self._speed: dict[str, float] = {}
        self._drawn_s = -math.inf
        # No markup: brackets in a user's names are text.
        self._console = Console(
            file=stream or sys.stdout,
            force_terminal=is_terminal,
            markup=False,
            highlight=False,
            soft_wrap=not is_terminal,
        )
        self._console.print(heading(facts, steps=steps, first_step=first_step))
        self._live: Live | None = None
        if is_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Show one step."""
        self._smooth(numbers)
        is_last = step >= self._steps
        shown = {**numbers, **self._speed}
        if self._live is None:
            if step % self._interval == 0 or is_last:
                self._print("  ".join(step_parts(step, shown, steps=self._steps, facts=self._facts)))
        elif is_last or time.monotonic() - self._drawn_s > REFRESH_S:
            line = live_line(step, shown, steps=self._steps, facts=self._facts, width=self._console.width)
            self._live.update(Text(line, no_wrap=True, overflow="crop"), refresh=True)
            self._drawn_s = time.monotonic()
        if "eval/loss" in numbers:
            loss, perplexity = numbers["eval/loss"], numbers.get("eval/perplexity", math.nan)
            self._print(f"step {step}/{self._steps}  validation loss {loss:.4f}  perplexity {perplexity:.2f}")

    def close(self) -> None:
        """End the live line; the last one stays."""
        if self._live is not None:
            self._live.stop()

    def _print(self, line: str) -> None:
        self._console.print(line)
        self._console.file.flush()

    def _smooth(self, numbers: Mapping[str, float]) -> None:
        for key in SMOOTHED:
            value = numbers[key]
            self._speed[key] = self._speed.get(key, value) * (1 - SMOOTHING) + value * SMOOTHING


def heading(facts: Facts, *, steps: int, first_step: int) -> str:
    """What is trained where, and what MFU is measured against."""
    where = f"{facts['world_size']} x {facts['device']}, {facts['dtype']}"
    start = f"resumes after step {first_step} of {steps}" if first_step else f"{steps} steps"
    return (
        f"{facts['model']}: {magnitude(float(facts['parameters']))} parameters on {where}; {start}\n"
        f"MFU counts {facts['mfu_attention']} attention, against {float(facts['peak_tflops']):.3g} TFLOP/s "
        f"a rank ({facts['peak_source']}); memory is {facts['memory_kind']} on rank 0"
    )


def step_parts(step: int, numbers: Mapping[str, float], *, steps: int, facts: Facts) -> list[str]:
    """A step as short texts, the most important first."""
    skipped = " (skipped)" if numbers["train/skipped"] else ""
    return [
        f"step {step}/{steps}{skipped}",
        f"loss {numbers['train/loss']:.4f}",
        f"{magnitude(numbers['perf/tokens_per_s'])} tokens/s",
        f"left {duration(numbers['progress/eta_s'])}",
        f"grad norm {numbers['train/grad_norm']:.3g}",
        f"lr {numbers['train/lr']:.2e}",
        f"MFU({facts['mfu_attention']}) {numbers['perf/mfu']:.1%}",
        f"{numbers['perf/memory_gib']:.2f} GiB",
    ]


def live_line(step: int, numbers: Mapping[str, float], *, steps: int, facts: Facts, width: int) -> str:
    """A step on one line of at most `width` columns: a bar if there is room, else the last parts go."""
    parts = step_parts(step, numbers, steps=steps, facts=facts)
    while len("  ".join(parts)) > width and len(parts) > 1:
        parts.pop()
    text = "  ".join(parts)
    bar_width = min(BAR_WIDTH, width - len(text) - 2)
    if bar_width < MIN_BAR_WIDTH:
        return text[:width]
    done = bar_width * min(step, steps) // max(1, steps)
    return "━" * done + "─" * (bar_width - done) + "  " + text


def magnitude(value: float) -> str:
    """Three digits and a letter: 950, 12.3k, 6.74B."""
    if not math.isfinite(value):
        return str(value)
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # Half a digit early: 999.7 thousand is 1M.
        if abs(value) >= 0.9995 * unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """h:mm:ss."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
