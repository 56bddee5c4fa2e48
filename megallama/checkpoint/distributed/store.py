"""Saving and loading of a checkpoint by all ranks: the directory protocol around torch.distributed.checkpoint."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from megallama.checkpoint.distributed.planner import BoxLoadPlanner, BoxSavePlanner
from megallama.checkpoint.distributed.retention import remove_old
from megallama.checkpoint.distributed.storage import BoxReader, BoxWriter
from megallama.checkpoint.format.boxes import BoxedTensor
from megallama.checkpoint.format.disk import LOCAL_DISK, Disk, no_space_text
from megallama.checkpoint.format.model_identity import check_model
from megallama.checkpoint.format.protocol import (
    check_sizes,
    publish,
    read_index,
    read_manifest,
    start_temporary,
    write_manifest,
)
from megallama.checkpoint.format.record import (
    ALIGNMENT_BYTES,
    JSON,
    CheckpointManifest,
    TensorRecord,
    damage_at,
    plain_json,
)
from megallama.host.errors import UserError
from megallama.topology.agreement import Ranks, portable

T = TypeVar("T")

_INDEX_BYTES_PER_BOX = 128
"""Generous estimate of a box's share of the index, for the check of free space."""


def save_checkpoint(
    directory: Path,
    *,
    step: int,
    tensors: Mapping[str, BoxedTensor],
    state: Mapping[str, JSON],
    model: Mapping[str, JSON],
    keep: int,
    keep_every: int = 0,
    verified: set[int] | None = None,
    group: dist.ProcessGroup | None = None,
    disk: Disk = LOCAL_DISK,
) -> Path:
    """Writes the checkpoint of `step` into `directory`, then removes old ones (`retention.remove_old`).

    Called by every rank of `group` (default: all ranks; one process without torch.distributed). `state` and
    `model` are taken from rank 0. `disk` writes this rank's bytes. On return the checkpoint is complete and on
    the disk; on an error, which every rank gets, older checkpoints are as they were and nothing of this one is
    left.

    Raises:
        UserError: the disk is full, not writable or not shared by all ranks.
        CheckpointError: `state` or `model` is not plain JSON, the boxes of all ranks do not make up whole
            tensors, or another fault of the program.
    """
    ranks = Ranks(group)
    described = ranks.first(lambda: (plain_json(model, what="model"), plain_json(state, what="state")))
    needed = sum(ranks.gather(_bytes_to_write(tensors)))
    ranks.first(lambda: _check_space(directory, needed, disk))
    temporary = ranks.first(lambda: start_temporary(directory, step=step))
    try:
        ranks.everywhere(lambda: _check_shared(temporary))
        writer = BoxWriter(temporary, world_size=ranks.size, disk=disk)
        _translated(
            lambda: save(dict(tensors), storage_writer=writer, planner=BoxSavePlanner(), process_group=group),
            ranks,
        )
        files = {name: record for part in ranks.gather(writer.files) for name, record in part.items()}
        manifest = CheckpointManifest(step, *described, files)
        ranks.first(lambda: write_manifest(temporary, manifest, disk=disk))
        path = ranks.first(lambda: publish(temporary, step=step))
    except BaseException:
        if ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    known = set() if verified is None else verified
    known.discard(step)
    remove_old(directory, step=step, keep=keep, keep_every=keep_every, verified=known, ranks=ranks)
    return path


def load_checkpoint(
    path: Path,
    *,
    tensors: Mapping[str, BoxedTensor],
    model: Mapping[str, JSON],
    kind: str | None = None,
    may_differ: Collection[str] = (),
    group: dist.ProcessGroup | None = None,
) -> dict[str, JSON]:
    """Fills the boxes of `tensors` in place from the checkpoint at `path` and returns its state.

    The layout of the saving run does not matter. Contents are not digested: `latest_checkpoint` does that.
    Only tensors of one `kind` (`fp32`) are filled if it is given; the checkpoint may then lack the others.
    Keys of `model` in `may_differ` are not compared.

    Raises:
        UserError: the checkpoint is of another model (with the differing keys), or cannot be read.
        DamagedError: it is incomplete.
    """
    ranks = Ranks(group)
    manifest, index = ranks.everywhere(
        lambda: _open(path, model, may_differ=may_differ, with_sizes=ranks.is_first)
    )
    if kind is not None:
        index = {key: record for key, record in index.items() if key.startswith(f"{kind}/")}
        tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{kind}/")}
    reader = BoxReader(path, tensors=index)
    with torch.no_grad(), damage_at(path):
        _translated(
            lambda: load(dict(tensors), storage_reader=reader, planner=BoxLoadPlanner(), process_group=group),
            ranks,
        )
    return manifest.state


def _open(
    path: Path, model: Mapping[str, JSON], *, may_differ: Collection[str], with_sizes: bool
) -> tuple[CheckpointManifest, dict[str, TensorRecord]]:
    with damage_at(path):
        manifest = read_manifest(path)
        if with_sizes:
            check_sizes(path, manifest)
        check_model(path, manifest.model, plain_json(model, what="model"), may_differ=may_differ)
        return manifest, read_index(path, manifest)


def _check_space(directory: Path, needed: int, disk: Disk) -> None:
    if disk.free_bytes(directory) < needed:
        raise UserError(no_space_text(directory, needed_bytes=needed, reason="disk is too full"))


def _check_shared(temporary: Path) -> None:
    if not temporary.is_dir():
        raise UserError(
            f"rank 0 made {temporary} and another rank does not see it:"
            " train.run_dir must be on a file system that all nodes share"
        )


def _bytes_to_write(tensors: Mapping[str, BoxedTensor]) -> int:
    boxes = [view for tensor in tensors.values() if tensor.is_owner for view in tensor.boxes.values()]
    return sum(view.nbytes + ALIGNMENT_BYTES + _INDEX_BYTES_PER_BOX for view in boxes)


def _translated(function: Callable[[], T], ranks: Ranks) -> T:
    """Runs a call of torch.distributed.checkpoint; its failure (a BaseException) becomes an error of ours."""
    try:
        if ranks.is_distributed:
            return function()
        with warnings.catch_warnings():
            # One process without a process group is a supported way to work, not a mistake. Filters are of
            # the whole process, so a background save, which has a group, must not touch them.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            return function()
    except CheckpointException as failure:
        errors = [error for _, (error, _) in sorted(failure.failures.items())]
        for error in errors:
            if not isinstance(error, Exception):  # Ctrl-C, which torch caught
                raise error from failure
        raise portable(errors[0]) from failure
