"""metrics.jsonl: one JSON object per step; everything else can be redrawn from it.

JSON has no infinity and no NaN. Such a value is written as null, and the object gets a further key
`nonfinite` that says which it was: {"train/grad_norm": null, "nonfinite": {"train/grad_norm": "inf"}}.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megallama.host.files import replacing

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
STEP = "progress/step"
NONFINITE = "nonfinite"
DAMAGED_SUFFIX = ".damaged"
"""Added to the name of the file that keeps lines which a resume could not read."""


class StepLines:
    """A file of one JSON object a step, each flushed, so that a crash costs no completed step."""

    def __init__(self, path: Path, *, first_step: int) -> None:
        """Open `path`; lines of steps after `first_step`, which an interrupted run left, are dropped.

        Raises:
            ValueError: it holds something else than such lines.
        """
        if path.exists():
            self._cut_after(path, step=first_step)
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

    def _cut_after(self, path: Path, *, step: int) -> None:
        """Rewrite the file with the steps up to `step`; a crash on the way leaves the old file."""
        damaged: dict[int, bytes] = {}
        with replacing(path) as kept:
            for number, (line, row) in enumerate(_complete_lines(path), start=1):
                if row is None or not self._is_ours(row):
                    damaged[number] = line
                elif row[STEP] <= step:
                    kept.write(line)
            if damaged:
                self._treat_damaged(path, damaged)

    def _is_ours(self, row: Mapping[str, Any]) -> bool:
        return True

    def _treat_damaged(self, path: Path, damaged: Mapping[int, bytes]) -> None:
        raise ValueError(f"{_named(list(damaged))} cannot be read")


class JsonlSink(StepLines):
    """The metrics of a run."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Append one step."""
        self.append(to_line({STEP: step, **numbers}))

    def _is_ours(self, row: Mapping[str, Any]) -> bool:
        return _is_numbers(row)

    def _treat_damaged(self, path: Path, damaged: Mapping[int, bytes]) -> None:
        """Put them in a file beside it: their steps are not done again, so they may be all that is left of them."""
        aside = path.with_name(path.name + DAMAGED_SUFFIX)
        with aside.open("ab") as lines:
            lines.writelines(damaged.values())
        log.warning("%s: %s cannot be read and moved to %s", path, _named(list(damaged)), aside.name)


def to_line(numbers: Mapping[str, float]) -> str:
    """One line of the file."""
    finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
    nonfinite = {key: str(float(value)) for key, value in numbers.items() if not math.isfinite(value)}
    row = {**finite, NONFINITE: nonfinite} if nonfinite else finite
    return json.dumps(row, allow_nan=False) + "\n"


def load_metrics(path: Path) -> list[dict[str, float]]:
    """All steps of a metrics.jsonl, in order; values that JSON cannot hold come back as inf, -inf or nan.

    A last line without its end, which a killed process may leave, is left out. So are damaged lines, with one
    warning.
    """
    lines = [(line, row if _is_numbers(row) else None) for line, row in _complete_lines(path)]
    damaged = [number for number, (_, row) in enumerate(lines, start=1) if row is None]
    if damaged:
        log.warning("%s: %s cannot be read and left out", path, _named(damaged))
    return [row for _, row in lines if row is not None]


def _complete_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line and what it says; None where it is damaged."""
    with path.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                return
            yield line, _row(line)


def _is_numbers(row: Mapping[str, Any] | None) -> bool:
    return row is not None and all(isinstance(value, int | float) for value in row.values())


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode())
        if not isinstance(row, dict) or not isinstance(row.get(STEP), int):
            return None
        for key, text in row.pop(NONFINITE, {}).items():
            row[key] = float(text)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return row


def _named(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"line {numbers[0]}"
    return f"{len(numbers)} lines ({', '.join(map(str, numbers[:4]))}{', ...' if len(numbers) > 4 else ''})"
