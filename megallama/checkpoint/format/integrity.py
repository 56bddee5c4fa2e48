"""Verification of checkpoints against their checksums, and the newest one that is intact."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megallama.checkpoint.format.disk import file_problem
from megallama.checkpoint.format.protocol import (
    checkpoints_below,
    extra_files,
    find_checkpoints,
    is_checkpoint,
    no_checkpoint,
    put_back_replaced,
    read_index,
    read_manifest,
    step_name,
)
from megallama.checkpoint.format.record import INDEX_FILE, CheckpointManifest
from megallama.host.errors import DamagedError, UserError
from megallama.topology.agreement import Ranks


def verify_checkpoint(path: Path) -> list[str]:
    """Everything that is wrong with the checkpoint at `path`, one text a problem. Reads every byte once."""
    try:
        problems = problems_of_share(path, rank=0, size=1)
        if not problems:
            problems = [f"{name} does not belong to it" for name in extra_files(path, read_manifest(path))]
    except UserError as error:
        return [str(error)]
    return problems


def latest_checkpoint(
    directory: Path, *, log: Callable[[str], None], group: dist.ProcessGroup | None = None
) -> Path | None:
    """The newest intact checkpoint in `directory`, or None if there is no checkpoint at all.

    Damaged ones are skipped with one line to `log` each, on rank 0; files that do not belong to a checkpoint
    do no harm. The ranks of `group` share the reading and get the same answer.

    Raises:
        UserError: there are checkpoints and none is intact (starting anew would hide the loss), or one may
            not be read or is of a newer format.
    """
    ranks = Ranks(group)
    paths = [directory / step_name(step) for step in ranks.first(lambda: _steps(directory))]
    return _newest_intact(paths, log=log, ranks=ranks)


def _newest_intact(paths: list[Path], *, log: Callable[[str], None], ranks: Ranks) -> Path | None:
    damaged = []
    for path in reversed(paths):
        problems = _shared_problems(path, ranks)
        if not problems:
            return path
        damaged.append(path.name)
        if ranks.is_first:
            log(f"checkpoint {path} is damaged ({'; '.join(problems)}): skipped")
    if damaged:
        raise UserError(
            f"no intact checkpoint in {paths[0].parent} (damaged: {', '.join(damaged)}): restore one,"
            " or move the directory away to start from the beginning"
        )
    return None


def locate_checkpoint(
    path: Path, *, log: Callable[[str], None], group: dist.ProcessGroup | None = None
) -> Path:
    """The checkpoint that `path` means: itself if it is one, else the newest intact one of that run folder.

    Nothing is changed on disk, for the run may be another's. A checkpoint that is named is not digested here.

    Raises:
        UserError: there is none, or none is intact.
    """
    ranks = Ranks(group)
    if ranks.first(lambda: is_checkpoint(path)):
        return path
    found = _newest_intact(ranks.first(partial(checkpoints_below, path)), log=log, ranks=ranks)
    if found is None:
        raise no_checkpoint(path)
    return found


def intact_checkpoint(
    path: Path, *, log: Callable[[str], None], group: dist.ProcessGroup | None = None
) -> Path:
    """`locate_checkpoint`, and one that is named is digested too; the ranks of `group` share the reading.

    Raises:
        UserError: there is none that is intact.
    """
    ranks = Ranks(group)
    found = locate_checkpoint(path, log=log, group=group)
    if found == path:
        problems = _shared_problems(path, ranks)
        if problems:
            raise DamagedError(f"checkpoint {path} is damaged ({'; '.join(problems)}): use another one")
    return found


def _steps(directory: Path) -> list[int]:
    put_back_replaced(directory)
    return find_checkpoints(directory)


def _shared_problems(path: Path, ranks: Ranks) -> list[str]:
    shares = ranks.all_of(partial(problems_of_share, path, rank=ranks.rank, size=ranks.size))
    return list(dict.fromkeys(problem for share in shares for problem in share))


def problems_of_share(path: Path, *, rank: int, size: int) -> list[str]:
    """What rank `rank` of `size` finds: rank 0 looks at the index, and all share the data files."""
    try:
        manifest = read_manifest(path)
    except DamagedError as error:
        return [str(error)]
    problems: list[str] = []
    if rank == 0:
        try:
            read_index(path, manifest)
        except DamagedError as error:
            problems.append(str(error))
    for name in _share(manifest, rank=rank, size=size):
        problem = file_problem(path / name, manifest.files[name])
        problems += [problem] if problem else []
    return problems


def _share(manifest: CheckpointManifest, *, rank: int, size: int) -> list[str]:
    """Data files that this rank reads: dealt out by size, so that the shares are about equal."""
    load = [0] * size
    mine = []
    for name, record in sorted(manifest.files.items(), key=lambda item: (-item[1].size_bytes, item[0])):
        if name == INDEX_FILE:  # read_index checks it
            continue
        lightest = load.index(min(load))
        load[lightest] += record.size_bytes
        if lightest == rank:
            mine.append(name)
    return mine
