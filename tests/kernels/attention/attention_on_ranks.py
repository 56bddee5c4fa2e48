"""What the ranks of the context-parallel tests do; importable, so that they can be started."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.utils.checkpoint

from megallama.kernels.attention import fused
from megallama.kernels.attention.core import Attention, masked_attention
from megallama.kernels.attention.zigzag import take_shard

KINDS = ("all_gather", "ring", "ulysses")


def draw(heads: int, kv_heads: int, *, seq_len: int, batch: int, width: int = 8) -> list[torch.Tensor]:
    """q, k, v and the output's gradient, fp64, equal on every rank."""
    torch.manual_seed(heads * 100 + kv_heads)
    counts = (heads, kv_heads, kv_heads, heads)
    return [torch.randn(seq_len, batch, count, width, dtype=torch.float64) for count in counts]


def results(attention: Any, tensors: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """Output and gradients of q, k, v."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors[:3]]
    out = attention(*leaves, scale=0.3, **options)
    out.backward(tensors[3])
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def worst_error(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Largest relative difference of two lists of tensors."""
    return max(float((g - w).norm() / w.norm()) for g, w in zip(got, wanted, strict=True))


def errors_of(cases: list[tuple[str, str, int, int, Any, bool]], seq_len: int) -> list[float]:
    """The error of each (backend, kind, heads, kv_heads, documents, is_recomputed) on this rank."""
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    shard = {"dim": 0, "cp_size": group.size(), "cp_rank": group.rank()}
    errors = []
    for backend, kind, heads, kv_heads, documents, is_recomputed in cases:
        batch = 2 if documents is None else len(documents)
        tensors = draw(heads, kv_heads, seq_len=seq_len, batch=batch)
        wanted = results(masked_attention, tensors, documents=documents)
        attention: Any = Attention(backend, kind)
        if is_recomputed:
            attention = _recomputed(attention)
        own = [take_shard(tensor, **shard) for tensor in tensors]
        got = results(attention, own, documents=documents, group=group)
        errors.append(worst_error(got, [take_shard(tensor, **shard) for tensor in wanted]))
    return errors


def _recomputed(attention: Attention) -> Any:
    def run(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        out: torch.Tensor = torch.utils.checkpoint.checkpoint(
            lambda *t: attention(*t, **options), *tensors, use_reentrant=False
        )
        return out

    return run


def multiply_adds_of(kinds: tuple[str, ...], seq_len: int, documents: Any = None) -> dict[str, int]:
    """Multiply-adds of forward and backward on this rank, from the shapes that the kernel is called with."""
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    counted = {}
    for kind in kinds:
        counter = CallCounter()
        try:
            tensors = [
                take_shard(t, dim=0, cp_size=group.size(), cp_rank=group.rank())
                for t in draw(8, 4, seq_len=seq_len, batch=1)
            ]
            results(Attention("sdpa", kind), tensors, documents=documents, group=group)
        finally:
            counter.stop()
        counted[kind] = counter.multiply_adds
    return counted


class CallCounter:
    """Counts what `CpuFlash` is asked to do: two products forward, five backward, half of them when causal."""

    def __init__(self) -> None:
        self.multiply_adds = 0
        self._plain = fused.CpuFlash.forward, fused.CpuFlash.backward
        forward, backward = self._plain

        def counted_forward(kernel: Any, q: Any, k: Any, v: Any, *, is_causal: bool, scale: float) -> Any:
            self._count(q, k, is_causal, products=2)
            return forward(kernel, q, k, v, is_causal=is_causal, scale=scale)

        def counted_backward(kernel: Any, grad: Any, q: Any, k: Any, *rest: Any, **options: Any) -> Any:
            self._count(q, k, options["is_causal"], products=5)
            return backward(kernel, grad, q, k, *rest, **options)

        fused.CpuFlash.forward = counted_forward  # type: ignore[method-assign]
        fused.CpuFlash.backward = counted_backward  # type: ignore[method-assign]

    def stop(self) -> None:
        """Count no longer."""
        fused.CpuFlash.forward, fused.CpuFlash.backward = self._plain  # type: ignore[method-assign]

    def _count(self, q: torch.Tensor, k: torch.Tensor, is_causal: bool, *, products: int) -> None:
        batch, heads, queries, width = q.shape
        pairs = queries * (queries + 1) // 2 if is_causal else queries * k.size(2)
        self.multiply_adds += products * batch * heads * pairs * width


def peak_bytes_of(kinds: tuple[str, ...], seq_len: int) -> dict[str, int]:
    """Peak bytes of forward and backward on this rank; documents of 100 tokens and a long one."""
    from benchmarks.attention_memory import peak_bytes

    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    documents = ((0, *range(seq_len // 2, seq_len, 100)),)
    peaks = {}
    for kind in kinds:
        tensors = [
            take_shard(t, dim=0, cp_size=group.size(), cp_rank=group.rank())
            for t in draw(4, 2, seq_len=seq_len, batch=1)
        ]
        options = {"documents": documents, "group": group}
        peaks[kind] = peak_bytes(lambda: results(Attention("sdpa", kind), tensors, **options))  # noqa: B023
    return peaks
