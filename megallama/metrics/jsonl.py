"""metrics.jsonl: one JSON object a step, the record that everything else can be redrawn from.

JSON has no infinity and no NaN. Such a value is written as null, and the object gets a further key
`nonfinite` that says which it was: {"train/grad_norm": null, "nonfinite": {"train/grad_norm": "inf"}}.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

METRICS_FILE = "metrics.jsonl"
STEP = "progress/step"
NONFINITE = "nonfinite"


class StepLines:
    """A file of one JSON object a step, each flushed, so that a crash costs no completed step."""

    def __init__(self, path: Path, *, first_step: int) -> None:
        """Open `path`; lines of steps after `first_step`, which an interrupted run left, are dropped."""
        if path.exists():
            _cut_after(path, step=first_step)
        self._file = path.open("a", encoding="utf-8")

    def append(self, line: str) -> None:
        """Append the line of a step, which has its number under STEP."""
        self._file.write(line)
        self._file.flush()

    def close(self) -> None:
        """Have everything on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class JsonlSink(StepLines):
    """The metrics of a run."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Append one step."""
        self.append(to_line({STEP: step, **numbers}))


def to_line(numbers: Mapping[str, float]) -> str:
    """One line of the file."""
    finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
    nonfinite = {key: str(float(value)) for key, value in numbers.items() if not math.isfinite(value)}
    row = {**finite, NONFINITE: nonfinite} if nonfinite else finite
    return json.dumps(row, allow_nan=False) + "\n"


def load_metrics(path: Path) -> list[dict[str, float]]:
    """All steps of a metrics.jsonl, in order; values that JSON cannot hold come back as inf, -inf or nan.

    A last line without its end, which a killed process may leave, is left out.
    """
    return [row for _, row in _complete_lines(path)]


def _complete_lines(path: Path) -> Iterator[tuple[str, dict[str, float]]]:
    with path.open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            if not line.endswith("\n"):
                return
            row = json.loads(line)
            for key, text in row.pop(NONFINITE, {}).items():
                row[key] = float(text)
            yield line, row


def _cut_after(path: Path, *, step: int) -> None:
    """Rewrite the file with the steps up to `step`; a crash on the way leaves the old file."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as kept:
        kept.writelines(line for line, row in _complete_lines(path) if row[STEP] <= step)
        kept.flush()
        os.fsync(kept.fileno())
    os.replace(partial, path)
