"""Which checkpoints are kept: the newest ones, multiples of `checkpoint.keep_every`, and one that was read back."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from megallama.checkpoint.format.integrity import problems_of_share
from megallama.checkpoint.format.protocol import find_checkpoints, is_complete, remove, step_name
from megallama.host.errors import UserError
from megallama.topology.agreement import Ranks

log = logging.getLogger(__name__)


def remove_old(
    directory: Path, *, step: int, keep: int, keep_every: int, verified: set[int], ranks: Ranks
) -> None:
    """Removes what is older than the newest `keep` (0: nothing), the one of `step` among them.

    Steps that are multiples of `keep_every` (0: none) stay for good and count like others. Later steps (of a
    run that went back) and damaged ones among the kept neither count nor go. Before the first one goes, one of
    those that stay has been read back and found intact: unless `verified` names one of them, they are read,
    the newest first, and if none is intact nothing is removed. What cannot be removed stays, with
    one warning. Called by every rank.

    Args:
        directory: The checkpoints.
        step: The newest checkpoint of this run.
        keep: How many to keep.
        keep_every: Distance in steps of those that are kept for good.
        verified: Steps of checkpoints that this run found intact by reading them; kept up to date.
        ranks: They share the reading, and rank 0 removes.
    """
    try:
        kept, doomed = ranks.first(partial(_choose, directory, step=step, keep=keep, keep_every=keep_every))
        if doomed and _has_intact(directory, kept, verified=verified, ranks=ranks):
            verified.difference_update(doomed)
            ranks.first(partial(_remove, directory, doomed))
    except UserError as error:  # the new checkpoint is complete all the same
        if ranks.is_first:
            log.warning("old checkpoints are not removed: %s", error)


def _choose(directory: Path, *, step: int, keep: int, keep_every: int) -> tuple[list[int], list[int]]:
    """Steps that stay, the newest first, and steps that go."""
    kept: list[int] = []
    doomed: list[int] = []
    if keep == 0:
        return kept, doomed
    for older in sorted((s for s in find_checkpoints(directory) if s <= step), reverse=True):
        if len(kept) < keep:
            if older == step or is_complete(directory / step_name(older)):
                kept.append(older)
        elif keep_every == 0 or older % keep_every != 0:
            doomed.append(older)
    return kept, doomed


def _remove(directory: Path, steps: list[int]) -> None:
    for step in steps:
        remove(directory / step_name(step))


def _has_intact(directory: Path, steps: list[int], *, verified: set[int], ranks: Ranks) -> bool:
    """Whether one of `steps` is intact; reads only as far as it must."""
    for step in steps:
        if not verified.isdisjoint(steps):
            break
        path = directory / step_name(step)
        shares = ranks.all_of(partial(problems_of_share, path, rank=ranks.rank, size=ranks.size))
        problems = [problem for share in shares for problem in share]
        if not problems:
            verified.add(step)
        elif ranks.is_first:
            log.warning("checkpoint %s is damaged (%s): older ones stay", path, "; ".join(problems))
    return not verified.isdisjoint(steps)
