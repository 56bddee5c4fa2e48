"""Checks before each step that replicas are bit-equal on all ranks and that gradients start from zero.

Each tensor becomes two 64-bit numbers, and one small all-reduce a group compares all of them; names and ranks are
gathered only where something differs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from megallama.engine.zero import ZeroEngine
from megallama.model.build import Stage
from megallama.topology.groups import Topology

CHUNK_ELEMENTS = 1 << 22
"""Elements that are widened to 64 bits at a time."""

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class InvariantError(RuntimeError):
    """Ranks disagree where they must not: a bug in the composition, or memory gone bad. Raised on every rank."""


class Invariants:
    """Checks one rank's stage against the other ranks that hold copies of it."""

    def __init__(self, stage: Stage, zero: ZeroEngine, *, topology: Topology) -> None:
        self._stage = stage
        self._zero = zero
        self._topology = topology

    def check(self, step: int) -> None:
        """Compare; a collective call.

        Raises:
            InvariantError: tensors and ranks that break a rule, on every rank of the job.
        """
        problems = [f"rank {self._topology.rank}: {text}" for text in self._leftover_gradients()]
        for rule, group, tensors in self._copies():
            problems += _disagreements(rule, group, tensors)
        count = torch.tensor(len(problems))
        dist.all_reduce(count, group=self._topology.host_group)
        if int(count) == 0:
            return
        gathered: list[list[str]] = [[] for _ in range(self._topology.world_size)]
        dist.all_gather_object(gathered, problems, group=self._topology.host_group)
        unique = list(dict.fromkeys(text for texts in gathered for text in texts))
        raise InvariantError(f"before step {step + 1}:\n" + "\n".join(f"  - {text}" for text in unique))

    def _copies(self) -> Iterator[tuple[str, dist.ProcessGroup, dict[str, torch.Tensor]]]:
        """(rule, group, tensors by canonical name) of what must be equal over the group."""
        topology = self._topology
        parameters = {
            self._stage.layout[name][0].key: parameter
            for name, parameter in self._stage.module.named_parameters()
        }
        # Under ZeRO 3 a data-parallel rank holds a part of its own, which the tp ranks beside it share.
        local = {key: getattr(p, "ds_tensor", p).detach() for key, p in parameters.items()}
        if self._zero.zero_stage < 3 and topology.dp_cp_group.size() > 1:
            yield "replicas (dp, cp) differ", topology.dp_cp_group, local
        replicated = {
            k: t for k, t in local.items() if not getattr(parameters[k], "tensor_model_parallel", False)
        }
        if topology.tp_group.size() > 1 and replicated:
            yield "copies over tp differ", topology.tp_group, replicated
        tied = self._tied()
        if tied is not None and topology.first_last_group is not None:
            yield "the tied weight differs between first and last stage", topology.first_last_group, tied

    def _tied(self) -> dict[str, torch.Tensor] | None:
        stage = self._stage
        if stage.module.tied is not None:
            weight = stage.module.tied.weight
            with self._zero.whole(weight):
                return {"embedding.word_embeddings.weight": weight.detach().clone()}
        if stage.tied_copy is not None:
            layer: Any = stage.chunks[-1].output_layer
            return {"embedding.word_embeddings.weight": layer.weight.detach()}
        return None

    def _leftover_gradients(self) -> Iterator[str]:
        for name, parameter in self._stage.module.named_parameters():
            key = self._stage.layout[name][0].key
            for attribute in ("grad", "grad_accum"):
                gradient = getattr(parameter, attribute, None)
                if gradient is not None and bool(gradient.count_nonzero()):
                    yield f"gradient of {key} is not zero before the first backward"
        for kept in self._zero.kept_gradients():
            if bool(kept.count_nonzero()):
                yield "ZeRO's gradient buffer is not zero before the first backward"


def _disagreements(rule: str, group: dist.ProcessGroup, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """One text for each tensor that is not the same on all ranks of the group; a collective call."""
    sums = torch.stack([checksum(tensor) for tensor in tensors.values()])
    # max(x) and max(~x) = ~min(x): equal on all ranks where both come back unchanged.
    pair = torch.stack([sums, ~sums])
    dist.all_reduce(pair, op=dist.ReduceOp.MAX, group=group)
    differs = (pair[0] != ~pair[1]).any(dim=1).tolist()
    if not any(differs):
        return []
    everyone = [torch.empty_like(sums) for _ in range(group.size())]
    dist.all_gather(everyone, sums, group=group)
    ranks = dist.get_process_group_ranks(group)
    problems = []
    for index, key in enumerate(tensors):
        if differs[index]:
            seen = [tuple(other[index].tolist()) for other in everyone]
            usual, count = Counter(seen).most_common(1)[0]
            odd = [rank for rank, value in zip(ranks, seen, strict=True) if value != usual]
            who = f"ranks {odd} against the others of {ranks}" if count > 1 else f"ranks {ranks}"
            problems.append(f"{rule}: {key} on {who}")
    return problems


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Two int64 of the tensor's bits: their sum, and their sum weighted by place (a swap changes it)."""
    bits = tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()])
    result = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for number, chunk in enumerate(bits.split(CHUNK_ELEMENTS)):
        wide = chunk.to(torch.int64)
        places = torch.arange(wide.numel(), device=wide.device) + number * CHUNK_ELEMENTS + 1
        result += torch.stack([wide.sum(), (wide * places).sum()])  # overflow wraps, and that is fine
    return result
