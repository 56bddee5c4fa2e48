"""Whether a state consists of finite numbers: before it is saved, and after it was loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist

from megallama.checkpoint.format.boxes import BoxedTensor
from megallama.config.schema import Dtype
from megallama.host.dtypes import FLOATS
from megallama.topology.agreement import Ranks


def not_finite(
    tensors: Mapping[str, BoxedTensor], *, dtype: Dtype, group: dist.ProcessGroup | None
) -> str | None:
    """What in `tensors` is no finite number, such as "fp32/embedding.word_embeddings.weight holds nan"; None: nothing.

    Master weights must also be finite once they are rounded to `dtype`, in which the model computes. Every rank of
    `group` calls it and gets the same answer.
    """
    limit = torch.finfo(FLOATS[dtype.full_name]).max
    own = (
        _fault(tensor, limit=limit if key.startswith("fp32/") else math.inf)
        for key, tensor in sorted(tensors.items())
    )
    found = Ranks(group).gather(next(filter(None, own), None))
    return next(filter(None, found), None)


@torch.no_grad()
def _fault(tensor: BoxedTensor, *, limit: float) -> str | None:
    extremes = [torch.stack(box.aminmax()) for box in tensor.boxes.values() if box.numel()]
    if not extremes:
        return None
    # A NaN stays one in all of these.
    lowest, highest = torch.stack(extremes).aminmax()
    largest = max(-float(lowest), float(highest))
    if math.isnan(largest) or math.isnan(float(lowest)):
        return f"{tensor.key} holds nan"
    if math.isinf(largest):
        return f"{tensor.key} holds inf"
    return f"{tensor.key} holds {largest:.3g}, too large for the number format" if largest > limit else None
