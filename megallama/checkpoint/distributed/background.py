"""Saves in the background: a copy of the state, and a thread that writes it while training continues."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megallama.checkpoint.distributed.staging import Staging
from megallama.checkpoint.distributed.store import save_checkpoint
from megallama.checkpoint.format.boxes import BoxedTensor
from megallama.checkpoint.format.disk import LOCAL_DISK, Disk
from megallama.checkpoint.format.record import JSON
from megallama.host.errors import UserError


@dataclass(frozen=True)
class SaveOutcome:
    """How a background save ended; the same on every rank."""

    step: int
    seconds: float
    """From the copy to the last byte on the disk."""
    problem: str | None
    """Why there is no checkpoint of that step, or None if there is."""


class BackgroundSaver:
    """One save at a time in a thread of its own, which talks to the other ranks through a group of its own.

    Args:
        directory: The checkpoints.
        model: What must agree for a checkpoint to be of this model.
        keep: Newest checkpoints that are kept; 0 keeps all.
        keep_every: Distance in steps of checkpoints that are kept for good; 0: none.
        verified: Steps of checkpoints that this run found intact by reading them.
        group: All ranks that save, gloo, used by nobody else while a save may run.
        disk: Writes the bytes.
    """

    def __init__(
        self,
        directory: Path,
        *,
        model: Mapping[str, JSON],
        keep: int,
        keep_every: int = 0,
        verified: set[int] | None = None,
        group: dist.ProcessGroup | None = None,
        disk: Disk = LOCAL_DISK,
    ) -> None:
        self._directory = directory
        self._model = model
        self._keep = keep
        self._keep_every = keep_every
        self._verified = set() if verified is None else verified
        self._group = group
        self._disk = disk
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._outcome: SaveOutcome | None = None
        self._fault: Exception | None = None

    @property
    def is_running(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def reserve(self, tensors: Mapping[str, BoxedTensor]) -> None:
        """Take the memory for the copy of `tensors` now. Raises UserError where the host does not have it."""
        self._staging.reserve(tensors)

    def start(self, *, step: int, tensors: Mapping[str, BoxedTensor], state: Mapping[str, JSON]) -> None:
        """Copy `tensors` and return; they are written meanwhile. The save before must have been waited for.

        Called by every rank. `state` is taken from rank 0.
        """
        assert self._thread is None, "wait() for the save before"
        began = time.perf_counter()
        staged = self._staging.copy(tensors)
        self._thread = threading.Thread(
            target=self._run, args=(step, staged, state, began), name="checkpoint-save", daemon=True
        )
        self._thread.start()

    def wait(self) -> SaveOutcome | None:
        """Wait for the save under way; how it ended, once, or None if there is none.

        Raises:
            CheckpointError: a fault of the program; what the user can mend is in the outcome.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault
        outcome, self._outcome = self._outcome, None
        return outcome

    def save_now(self, *, step: int, tensors: Mapping[str, BoxedTensor], state: Mapping[str, JSON]) -> None:
        """Save without a copy and without a thread. The save before must have been waited for.

        Raises:
            UserError, CheckpointError: as `save_checkpoint`.
        """
        assert self._thread is None, "wait() for the save before"
        self._save(step, tensors, state)

    def _run(
        self, step: int, staged: Mapping[str, BoxedTensor], state: Mapping[str, JSON], began: float
    ) -> None:
        problem = None
        try:
            self._save(step, staged, state)
        except UserError as error:
            problem = str(error)
        except Exception as error:
            self._fault = error
        self._outcome = SaveOutcome(step, time.perf_counter() - began, problem)

    def _save(self, step: int, tensors: Mapping[str, BoxedTensor], state: Mapping[str, JSON]) -> None:
        save_checkpoint(
            self._directory,
            step=step,
            tensors=tensors,
            state=state,
            model=self._model,
            keep=self._keep,
            keep_every=self._keep_every,
            verified=self._verified,
            group=self._group,
            disk=self._disk,
        )
