"""What a run needs of its data: this rank's micro-batches of any step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar, Generic, TypeVar

T = TypeVar("T")


class Loader:
    """The micro-batches of one data-parallel rank. All ranks of its tp and pp groups are given the same samples.

    Stages in the middle of a pipeline need `positions_BS` and `document_starts` only, context-parallel ranks their part
    of each sequence: `rank_part(topology, train)` says what a rank takes, and cuts it.
    """

    record_name: ClassVar[str] = "own_data"
    """Where checkpoints keep what `ledger` gives."""

    is_traceable: ClassVar[bool] = False
    """Whether `sample_ids` says what a step reads. The run folder then keeps `ledger` for `megallama trace`."""

    def batches(self, step: int) -> Sequence[Any]:
        """This rank's micro-batches of step `step`, counted from 0.

        As a pure function of `step` it needs nothing else to resume.
        """
        raise NotImplementedError

    def validation_batches(self) -> Sequence[Sequence[Any]]:
        """The micro-batches of each validation batch, always the same ones; none: the run is not evaluated."""
        return []

    @property
    def num_validation_batches(self) -> int:
        """How many `validation_batches` gives, without reading them."""
        return 0

    def resume(self, record: Any, *, step: int, consumed_samples: int) -> None:
        """Go on at `step`; `record` is what `ledger` gave to the checkpoint, None where that is of other data."""

    def check_enough(self) -> None:
        """Raise UserError where the data does not last to the end of the run."""

    def ledger(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` steps is to hold for `resume`: plain JSON."""
        return {}

    def sample_ids(self, step: int) -> dict[str, Any]:
        """Which samples the whole job takes at step `step`, counted from 0: plain JSON for `log.samples`."""
        raise NotImplementedError

    def close(self) -> None:
        """The run has ended."""


class ReadAhead(Generic[T]):
    """Reads the next step on a thread while this one is computed."""

    def __init__(self, read: Callable[[int], T]) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: tuple[int, Future[T]] | None = None

    def __call__(self, step: int, *, has_next: bool) -> T:
        """`read(step)`; where there is a next step, it is begun."""
        ahead, self._ahead = self._ahead, None
        try:
            if ahead is not None and ahead[0] == step:
                return ahead[1].result()
            return self._read(step)
        finally:
            if has_next:
                self._ahead = (step + 1, self._thread.submit(self._read, step + 1))

    def forget(self) -> None:
        """What was begun is of another plan."""
        self._ahead = None

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
