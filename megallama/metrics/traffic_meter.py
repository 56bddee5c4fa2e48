"""Measures the bytes that this rank moves through torch.distributed, by group, operation and number format.

Every collective and send of torch, megatron-core and DeepSpeed ends in a method of `ProcessGroup`, however it
was imported; these methods are wrapped while a meter runs, and untouched otherwise.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from megallama.host.dtypes import dtype_name
from megallama.topology.groups import Topology

TrafficKey: TypeAlias = tuple[str, str, str]
"""(group, operation, format), for example ("tp", "all_reduce", "float32")."""

Traffic: TypeAlias = dict[TrafficKey, int]
"""Bytes of the larger buffer of each call: what all_gather gives, what reduce_scatter takes."""

# Method of ProcessGroup: (operation, position of the argument whose tensors are counted).
METHODS: dict[str, tuple[str, int]] = {
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce", 0),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "allgather": ("all_gather", 0),
    "_allgather_base": ("all_gather", 0),
    "all_gather_single": ("all_gather", 0),
    "all_gather_single_coalesced": ("all_gather", 0),
    "allgather_coalesced": ("all_gather", 0),
    "allgather_into_tensor_coalesced": ("all_gather", 0),
    "reduce_scatter": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 1),
    "alltoall_base": ("all_to_all", 1),
    "all_to_all_single": ("all_to_all", 1),
    "alltoall": ("all_to_all", 1),
    "gather": ("gather", 1),
    "scatter": ("scatter", 0),
    "send": ("send", 0),
}
"""What is counted. `recv` is not: it is the other end of a `send`."""


class TrafficMeter:
    """Counts within `with meter:`; `take` gives the sums and starts anew. Groups of one rank move nothing."""

    def __init__(self, topology: Topology) -> None:
        self._names: dict[str, str] = {}
        for name, group in _named_groups(topology):
            self._names.setdefault(group.group_name, name)
        self._bytes: Counter[TrafficKey] = Counter()
        self._originals: dict[str, Any] = {}
        self._depth = 0

    def __enter__(self) -> TrafficMeter:
        for method, (operation, position) in METHODS.items():
            if method in vars(dist.ProcessGroup):
                # The descriptor, which binds when it is put back; the plain function does not.
                self._originals[method] = vars(dist.ProcessGroup)[method]
                function = getattr(dist.ProcessGroup, method)
                setattr(dist.ProcessGroup, method, self._counted(function, operation, position))
        return self

    def __exit__(self, *_: object) -> None:
        for method, original in self._originals.items():
            setattr(dist.ProcessGroup, method, original)
        self._originals.clear()

    def take(self) -> Traffic:
        """Bytes since the last call."""
        taken = dict(self._bytes)
        self._bytes.clear()
        return taken

    def _counted(self, original: Callable[..., Any], operation: str, position: int) -> Callable[..., Any]:
        @functools.wraps(original)
        def counted(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            # One method may be built on another: only the outermost counts.
            if self._depth == 0 and group.size() > 1:
                name = self._names.get(group.group_name, group.group_desc)
                if operation == "send" and name != "cp":
                    # megatron-core sends one way of a two-stage pipeline through the group of all ranks.
                    name = "pp"
                for tensor in _tensors(args[position]):
                    key = (name, operation, dtype_name(tensor.dtype))
                    self._bytes[key] += tensor.numel() * tensor.element_size()
            self._depth += 1
            try:
                return original(group, *args, **kwargs)
            finally:
                self._depth -= 1

        return counted


def _named_groups(topology: Topology) -> Iterable[tuple[str, dist.ProcessGroup]]:
    for name in ("tp", "cp", "pp", "dp_cp", "dp", "tp_pp", "first_last", "host"):
        group = getattr(topology, f"{name}_group")
        if group is not None:
            yield name, group
    assert dist.group.WORLD is not None
    yield "world", dist.group.WORLD


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def to_metrics(traffic: Mapping[TrafficKey, int]) -> dict[str, float]:
    """As metrics: `traffic/<group>/<operation>/<format>_bytes`."""
    return {f"traffic/{g}/{op}/{dtype}_bytes": float(n) for (g, op, dtype), n in sorted(traffic.items())}
