"""The history as plain values: in checkpoints, and in the run folder for `megallama data trace`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megallama.host.errors import UserError
from megallama.stream.history import History, Mix, MixSource, Pace, Segment
from megallama.stream.windows import Cutting

VERSION = 1

LEDGER_FILE = "data.json"
"""Its name in a run folder."""


def to_plain(history: History, *, step: int) -> dict[str, Any]:
    """Mappings, lists, numbers and text of a history, and what was consumed of each source before `step`."""
    return {
        "version": VERSION,
        "step": step,
        "paces": [asdict(pace) for pace in history.paces],
        "segments": [
            {
                "first_sample": segment.first_sample,
                "cutting": asdict(segment.mix.cutting),
                "sources": [{**asdict(source), "span": list(source.span)} for source in segment.mix.sources],
                "used": {identity: list(used) for identity, used in segment.used.items()},
            }
            for segment in history.segments
        ],
        "consumed": _plain_used(history, step),
    }


def read_ledger(run_dir: Path) -> History:
    """The history that the run in `run_dir` recorded.

    Raises:
        UserError: there is none, or `from_plain` refuses it.
    """
    path = run_dir / LEDGER_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist: give the folder of a run (of a megallama that records its data)"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): start the run again to write it anew") from error
    return from_plain(values)


def from_plain(values: Any) -> History:
    """Inverse of `to_plain`.

    Raises:
        UserError: another version wrote it, or it contradicts itself.
    """
    version = values.get("version") if isinstance(values, dict) else None
    if version != VERSION:
        raise UserError(
            f"the record of consumed data has version {version}, this megallama reads {VERSION}:"
            " continue with the version of megallama that wrote it"
        )
    try:
        step = values["step"]
        history = History(
            paces=tuple(Pace(**pace) for pace in values["paces"]),
            segments=tuple(
                Segment(
                    first_sample=segment["first_sample"],
                    mix=Mix(
                        cutting=Cutting(**segment["cutting"]),
                        sources=tuple(
                            MixSource(**{**source, "span": tuple(source["span"])})
                            for source in segment["sources"]
                        ),
                    ),
                    used={identity: (epoch, place) for identity, (epoch, place) in segment["used"].items()},
                )
                for segment in values["segments"]
            ),
        )
        consumed = _plain_used(history, step)
    except (LookupError, ArithmeticError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise UserError(
            f"the record of consumed data is damaged ({type(error).__name__}: {error}): go on from another checkpoint"
        ) from error
    if consumed != values.get("consumed"):
        raise UserError(
            f"the record of consumed data contradicts itself (it says {values.get('consumed')}, its mixes give"
            f" {consumed} at step {step}): go on from another checkpoint"
        )
    return history


def _plain_used(history: History, step: int) -> dict[str, Any]:
    return {identity: list(used) for identity, used in sorted(history.used_before(step).items())}
