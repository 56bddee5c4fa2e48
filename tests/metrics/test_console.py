"""What is on the screen."""

from __future__ import annotations

import io
import math

import pytest

from megallama.metrics.console import ConsoleSink, duration, live_line, magnitude
from tests.metrics.test_recorder import FACTS, numbers_of


def run(steps: int, *, is_terminal: bool, interval: int = 1, first_step: int = 0) -> str:
    """Output of a run whose third step has an evaluation."""
    stream = io.StringIO()
    sink = ConsoleSink(
        steps=steps,
        first_step=first_step,
        interval=interval,
        is_terminal=is_terminal,
        facts=FACTS,
        stream=stream,
    )
    for step in range(first_step + 1, steps + 1):
        extra = {"eval/loss": 3.25, "eval/perplexity": math.exp(3.25)} if step == 3 else {}
        sink.write(step, {**numbers_of(step), **extra})
    sink.close()
    return stream.getvalue()


def test_plain_lines_every_interval_and_at_the_end() -> None:
    lines = run(5, is_terminal=False, interval=2).splitlines()
    assert lines[0] == "小模型 [7b]: 1k parameters on 4 x cpu, fp32; 5 steps"
    assert "MFU counts causal attention, against 2 TFLOP/s a rank (test)" in lines[1]
    assert [line.split("  ")[0] for line in lines[2:]] == ["step 2/5", "step 3/5", "step 4/5", "step 5/5"]
    assert lines[3] == "step 3/5  validation loss 3.2500  perplexity 25.79"
    for word in ("loss 2.0000", "grad norm 0.7", "lr 1.00e-03", "1k tokens/s", "MFU(causal) 12.5%", "GiB"):
        assert word in lines[2]
    assert "\x1b" not in "".join(lines)


def test_resume_is_said() -> None:
    assert "resumes after step 3 of 5" in run(5, is_terminal=False, first_step=3)


def test_terminal_keeps_one_live_line_and_the_evaluations() -> None:
    text = run(5, is_terminal=True)
    assert "validation loss 3.2500" in text
    assert "\x1b[2K" in text  # the line is redrawn in its place
    assert text.rsplit("\x1b[2K", 1)[-1].startswith("step 5/5  loss 5.0000")


@pytest.mark.parametrize("width", [20, 60, 80, 120, 200])
def test_live_line_fits(width: int) -> None:
    line = live_line(1234, numbers_of(7), steps=10_000, facts=FACTS, width=width)
    assert len(line) <= width and "step 1234/10000" in line
    if width >= 120:
        assert "MFU(causal)" in line and "GiB" in line
    assert ("━" in line) == (width == 200)


def test_skipped_step_says_so() -> None:
    numbers = numbers_of(1, is_skipped=True, grad_norm=math.inf)
    line = live_line(1, numbers, steps=2, facts=FACTS, width=150)
    assert "(skipped)" in line and "grad norm inf" in line


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (12.34, "12.3"), (999.4, "999"), (999.7, "1k"), (12_345.0, "12.3k"), (6.738e9, "6.74B")],
)
def test_magnitude(value: float, text: str) -> None:
    assert magnitude(value) == text


def test_duration() -> None:
    assert [duration(s) for s in (0.4, 61, 360_000.0, math.inf)] == ["0:00:00", "0:01:01", "100:00:00", "?"]
