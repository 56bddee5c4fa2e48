"""Makes ranks succeed or fail together: every rank learns of a failure, so that none waits forever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from megallama.host.errors import CheckpointError, DamagedError, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class _Success(Generic[T]):
    value: T


class Ranks:
    """The ranks of one process group; a single one where torch.distributed is not initialised."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.is_distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if self.is_distributed else 0
        self.size = dist.get_world_size(group) if self.is_distributed else 1

    @property
    def is_first(self) -> bool:
        """Whether this rank decides."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order, on every rank."""
        if not self.is_distributed:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def all_of(self, function: Callable[[], T]) -> list[T]:
        """Runs `function` on every rank; the results in rank order, or the same error everywhere."""
        own_error: Exception | None = None
        outcome: _Success[T] | UserError | CheckpointError
        try:
            outcome = _Success(function())
        except Exception as error:
            own_error, outcome = error, portable(error)
        outcomes = self.gather(outcome)
        errors = [outcome for outcome in outcomes if not isinstance(outcome, _Success)]
        if errors:
            raise errors[0] from own_error
        return [outcome.value for outcome in outcomes if isinstance(outcome, _Success)]

    def first(self, function: Callable[[], T]) -> T:
        """Runs `function` on rank 0 alone; its result or its error on every rank."""
        results = self.all_of(lambda: function() if self.is_first else None)
        return results[0]  # type: ignore[return-value]

    def everywhere(self, function: Callable[[], T]) -> T:
        """Runs `function` on every rank; this rank's result, or the same error everywhere."""
        results: list[T] = []
        self.all_of(lambda: results.append(function()))
        return results[0]


@contextmanager
def portable_errors() -> Iterator[None]:
    """Turns any error into one that survives the way to the other ranks: a type of ours and a text."""
    try:
        yield
    except Exception as error:
        raise portable(error) from error


def portable(error: BaseException) -> UserError | CheckpointError:
    """`error` as DamagedError, UserError or CheckpointError."""
    if isinstance(error, DamagedError):
        return DamagedError(str(error))
    if isinstance(error, UserError):
        return UserError(str(error))
    if isinstance(error, CheckpointError):
        return CheckpointError(str(error))
    if isinstance(error, OSError):
        place = error.filename or "checkpoint directory"
        return UserError(f"{place} ({error.strerror or error}): check the disk and its permissions")
    return CheckpointError(f"{type(error).__name__}: {error}")
