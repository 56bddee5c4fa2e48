"""The copy of a rank's state in host memory from which a background save writes."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterator, Mapping

import torch

from megallama.checkpoint.format.boxes import BoxedTensor, Ints
from megallama.checkpoint.format.record import ALIGNMENT_BYTES
from megallama.host.errors import UserError

log = logging.getLogger(__name__)


class Staging:
    """One block of host memory, used again by every save; page-locked where the state lies on a GPU.

    It is as large as this rank's part of a checkpoint and no larger.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._unlock: Callable[[], object] = lambda: None

    @property
    def size_bytes(self) -> int:
        """What it takes of the host's memory."""
        return self._memory.nbytes

    def reserve(self, tensors: Mapping[str, BoxedTensor]) -> None:
        """Take the memory for `tensors` now, so that a host that lacks it is known before the first save.

        Raises:
            UserError: the host does not have it.
        """
        views = [view for _, _, view in _written(tensors)]
        needed = sum(_padded(view.nbytes) for view in views)
        if needed <= self.size_bytes:
            return
        try:
            self._unlock()
            self._memory = torch.empty(0, dtype=torch.uint8)
            # Zeroed, not only allocated: the first save should not be the one that waits for the pages.
            self._memory = torch.zeros(needed, dtype=torch.uint8)
        except RuntimeError as error:
            raise UserError(
                f"host memory for background saves ({needed} bytes on this rank) cannot be allocated: set"
                " checkpoint.async_save=false, or let more ranks share the optimizer state"
            ) from error
        if any(_is_on_gpu(view) for view in views):
            self._unlock = _page_lock(self._memory, owner=self)

    def copy(self, tensors: Mapping[str, BoxedTensor]) -> dict[str, BoxedTensor]:
        """What this rank writes of `tensors`, copied; valid until the next call. On return the source may change."""
        self.reserve(tensors)
        staged: dict[str, BoxedTensor] = {}
        position, has_cuda = 0, False
        for tensor, offset, view in _written(tensors):
            place = self._memory[position : position + view.nbytes].view(view.dtype).view(view.shape)
            place.copy_(view.detach(), non_blocking=True)
            position += _padded(view.nbytes)
            has_cuda |= _is_on_gpu(view)
            copy = staged.setdefault(
                tensor.key, BoxedTensor(tensor.key, tensor.global_shape, tensor.dtype, True, {})
            )
            copy.boxes[offset] = place
        if has_cuda:
            torch.cuda.current_stream().synchronize()
        return staged


def _written(tensors: Mapping[str, BoxedTensor]) -> Iterator[tuple[BoxedTensor, Ints, torch.Tensor]]:
    """The boxes that this rank writes, in the order in which they are written."""
    for _, tensor in sorted(tensors.items()):
        if tensor.is_owner:
            yield from ((tensor, offset, view) for offset, view in tensor.boxes.items())


def _is_on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


def _page_lock(memory: torch.Tensor, *, owner: object) -> Callable[[], object]:
    """Lock the pages of `memory`, so that a GPU copies to it at full speed; what undoes it, also when `owner` goes.

    Memory that torch itself locks (`pin_memory`) is rounded up to a power of two, up to twice what is needed.
    """
    runtime = torch.cuda.cudart()
    error = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if error != runtime.cudaError.success:
        log.warning(
            "memory for background saves cannot be page-locked (%s): saves stall training longer", error
        )
        return lambda: None
    undo = weakref.finalize(owner, runtime.cudaHostUnregister, memory.data_ptr())
    undo.atexit = False
    return undo


def _padded(size_bytes: int) -> int:
    return math.ceil(size_bytes / ALIGNMENT_BYTES) * ALIGNMENT_BYTES
