"""`megallama checkpoint`: lists, describes and verifies checkpoints."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megallama.commands.parser import Commands
from megallama.host.errors import EXIT_DIFFERENT

if TYPE_CHECKING:
    from megallama.checkpoint.offline.reader import CheckpointReader
    from megallama.checkpoint.offline.summary import Summary


def add(commands: Commands) -> None:
    """Add `megallama checkpoint` to the command line."""
    checkpoint = commands.add_parser("checkpoint", help="list, verify and describe checkpoints")
    actions = checkpoint.add_subparsers(metavar="ACTION", required=True)
    what = "run folder or step-... directory"

    listing = actions.add_parser("list", help="checkpoints of a run: step, size, age, layout, state")
    listing.add_argument("path", type=Path, help=what)
    listing.set_defaults(command=_list)

    verify = actions.add_parser("verify", help="read every byte; exit code 1 where something is damaged")
    verify.add_argument("paths", type=Path, nargs="+", metavar="path", help=what)
    verify.set_defaults(command=_verify)

    info = actions.add_parser("info", help="model, progress and tensors of a checkpoint")
    info.add_argument("path", type=Path, help=f"{what} (its newest complete checkpoint)")
    info.add_argument("--tensors", action="store_true", help="a line for every tensor")
    info.set_defaults(command=_info)


def _list(options: argparse.Namespace) -> None:
    from megallama.checkpoint.offline.summary import checkpoints_at, summarize

    rows = [_row(summarize(path)) for path in checkpoints_at(options.path)]
    print("\n".join(_table([("step", "size", "age", "layout", "state"), *rows])))


def _row(summary: Summary) -> tuple[str, ...]:
    age = _duration(time.time() - summary.written_s) if summary.written_s else "?"
    state = f"damaged: {summary.problem}" if summary.problem else "complete"
    step = str(int(summary.path.name.partition("-")[2])) if "-" in summary.path.name else summary.path.name
    return step, _size(summary.size_bytes), age, summary.layout or "?", state


def _verify(options: argparse.Namespace) -> int:
    from megallama.checkpoint.format.integrity import verify_checkpoint
    from megallama.checkpoint.offline.summary import checkpoints_at

    is_damaged = False
    for path in [found for given in options.paths for found in checkpoints_at(given)]:
        problems = verify_checkpoint(path)
        is_damaged |= bool(problems)
        print(f"{path}: {'damaged (' + '; '.join(problems) + ')' if problems else 'ok'}", flush=True)
    return EXIT_DIFFERENT if is_damaged else 0


def _info(options: argparse.Namespace) -> None:
    from megallama.checkpoint.offline.reader import CheckpointReader
    from megallama.checkpoint.offline.summary import checkpoints_at, summarize

    paths = checkpoints_at(options.path)
    complete = (path for path in reversed(paths) if len(paths) == 1 or not summarize(path).problem)
    reader = CheckpointReader(next(complete, paths[-1]), verify="never")
    print("\n".join(_description(reader)))
    if options.tensors:
        rows = [(key, str(list(reader.shape(key))), str(reader.dtype(key))) for key in reader.keys]
        print("\n".join(["", *_table([("tensor", "shape", "dtype"), *rows])]))


def _description(reader: CheckpointReader) -> Iterator[str]:
    from megallama.checkpoint.offline.summary import layout_text

    sizes = [math.prod(reader.shape(f"fp32/{name}")) for name in reader.names()]
    progress = reader.state.get("progress")
    yield f"checkpoint  {reader.folder}"
    yield f"size        {_size(reader.size_bytes)}"
    yield f"written by  {layout_text(reader.state.get('layout')) or '?'}"
    yield f"step        {reader.step:,}"
    if isinstance(progress, dict):
        tokens, samples = (_count(progress.get(f"consumed_{what}")) for what in ("tokens", "samples"))
        yield f"consumed    {tokens} tokens, {samples} samples"
    else:
        yield "consumed    nothing: weights only, for train.init_from"
    yield f"tensors     {len(reader.keys)} ({', '.join(reader.kinds)}), {sum(sizes):,} parameters"
    yield "model"
    yield from (f"  {key}: {value}" for key, value in sorted(reader.model.items()))


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "?"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
