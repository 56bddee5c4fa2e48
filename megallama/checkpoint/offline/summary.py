"""Summary of a checkpoint for `megallama checkpoint`: size, age, layout that wrote it, completeness."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megallama.checkpoint.format.disk import reading
from megallama.checkpoint.format.protocol import (
    checkpoints_below,
    is_checkpoint,
    no_checkpoint,
    read_index,
    read_manifest,
    size_problems,
)
from megallama.checkpoint.format.record import MANIFEST_FILE
from megallama.host.errors import UserError

_AXES = ("dp", "tp", "pp", "cp", "vp")


@dataclass(frozen=True)
class Summary:
    """One checkpoint as `megallama checkpoint list` shows it. Data files are not read."""

    path: Path
    size_bytes: int
    """Of all files that are there."""
    written_s: float
    """When its last file was written, seconds since 1970; 0 where that file is missing."""
    layout: str
    """How the run that wrote it was cut; empty if unknown."""
    problem: str
    """What is wrong with it; empty if all files are there with their sizes."""


def checkpoints_at(path: Path) -> list[Path]:
    """The checkpoint at `path`, or those of that run folder, ascending.

    Raises:
        UserError: there is none.
    """
    if is_checkpoint(path) and path.is_dir():
        return [path]
    found = checkpoints_below(path)
    if not found:
        raise no_checkpoint(path)
    return found


def summarize(path: Path) -> Summary:
    """What can be told of the checkpoint at `path` without reading its data.

    Raises:
        UserError: it may not be read.
    """
    layout, problem, written_s = "", "", 0.0
    try:
        with reading(path / MANIFEST_FILE):
            written_s = (path / MANIFEST_FILE).stat().st_mtime
        manifest = read_manifest(path)
        layout = layout_text(manifest.state.get("layout"))
        problem = "; ".join(size_problems(path, manifest))
        if not problem:
            read_index(path, manifest)
    except UserError as error:
        problem = str(error)
    size = sum(file.lstat().st_size for file in path.iterdir())
    return Summary(path, size, written_s, layout, problem)


def layout_text(layout: Any) -> str:
    """`describe_layout` of a checkpoint on one line: "4 ranks dp2 tp2 zero1 bf16"; empty if there are none."""
    if not isinstance(layout, dict):
        return ""
    axes = [f"{axis}{layout[axis]}" for axis in _AXES if layout.get(axis, 1) != 1]
    ranks = layout.get("ranks", "?")
    words = [f"{ranks} rank{'' if ranks == 1 else 's'}", *axes, f"zero{layout.get('zero', '?')}"]
    return " ".join([*words, str(layout.get("dtype", ""))]).strip()
