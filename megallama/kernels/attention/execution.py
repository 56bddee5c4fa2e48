"""Executes a plan: kernel calls for its rectangles and packs, with partial results merged by log-sum-exp.

Shapes: S local positions, B sequences, N query heads, K key/value heads, T positions of the given keys, D head
width; U tokens of a pack. Everything here is sequence-first, as megatron-core is; kernels see [B, N, S, D] views.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from megallama.kernels.attention.fused import Gradients, Kernel
from megallama.kernels.attention.plan import Pack, Plan


class Partial:
    """Attention of local queries over the keys seen so far."""

    def __init__(self, q_SBND: torch.Tensor, *, is_disjoint: bool) -> None:
        wide = torch.promote_types(q_SBND.dtype, torch.float32)
        self._is_disjoint = is_disjoint
        self.out_SBND = torch.zeros(
            q_SBND.shape, dtype=q_SBND.dtype if is_disjoint else wide, device=q_SBND.device
        )
        self.lse_SBN = torch.full(q_SBND.shape[:-1], -math.inf, dtype=wide, device=q_SBND.device)

    def add(self, out_old: torch.Tensor, lse_old: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Merge a partial result into views of this one."""
        if self._is_disjoint:
            out_old.copy_(out)
            lse_old.copy_(lse)
            return
        lse_new = torch.logaddexp(lse_old, lse)
        out_old.mul_((lse_old - lse_new).exp().unsqueeze(-1))
        out_old.addcmul_(out.to(out_old.dtype), (lse - lse_new).exp().unsqueeze(-1))
        lse_old.copy_(lse_new)


class GradientSums:
    """Gradients of local queries and of given keys and values, summed over rectangles in fp32 at least."""

    def __init__(self, q_SBND: torch.Tensor, k_TBKD: torch.Tensor, *, is_disjoint: bool) -> None:
        wide = torch.promote_types(q_SBND.dtype, torch.float32)
        dtype = q_SBND.dtype if is_disjoint else wide
        self.dq_SBND = torch.zeros(q_SBND.shape, dtype=dtype, device=q_SBND.device)
        self.clear_keys(k_TBKD, dtype=dtype)

    def clear_keys(self, k_TBKD: torch.Tensor, *, dtype: torch.dtype | None = None) -> None:
        """Start anew for other keys."""
        self.dkv_2TBKD = torch.zeros(
            (2, *k_TBKD.shape), dtype=dtype or self.dq_SBND.dtype, device=k_TBKD.device
        )


def run_forward(
    plan: Plan,
    q_SBND: torch.Tensor,
    k_TBKD: torch.Tensor,
    v_TBKD: torch.Tensor,
    *,
    partial: Partial,
    kernel: Kernel,
    scale: float,
) -> list[Any]:
    """Adds the attention over the given keys to `partial`; returns what the kernels want back in backward."""
    q, k, v = (_heads_first(t) for t in (q_SBND, k_TBKD, v_TBKD))
    out_BNSD, lse_BNS = _heads_first(partial.out_SBND), partial.lse_SBN.permute(1, 2, 0)
    saved = []
    for at in plan.rectangles:
        out, lse, kept = kernel.forward(
            q[at.rows, :, at.q],
            k[at.rows, :, at.k],
            v[at.rows, :, at.k],
            is_causal=at.is_causal,
            scale=scale,
        )
        partial.add(out_BNSD[at.rows, :, at.q], lse_BNS[at.rows, :, at.q], out, lse)
        saved.append(kept)
    out_UND, lse_UN = partial.out_SBND.flatten(0, 1), partial.lse_SBN.flatten(0, 1)
    for pack in plan.packs:
        out, lse, kept = _pack_forward(pack, q_SBND, k_TBKD, v_TBKD, kernel=kernel, scale=scale)
        saved.append(kept)
        index = pack.q_index
        if plan.is_disjoint:
            out_UND[index], lse_UN[index] = out, lse.to(lse_UN.dtype)
            continue
        out_old, lse_old = out_UND[index], lse_UN[index]
        partial.add(out_old, lse_old, out, lse)
        out_UND[index], lse_UN[index] = out_old, lse_old
    return saved


def run_backward(
    plan: Plan,
    grad_SBND: torch.Tensor,
    q_SBND: torch.Tensor,
    k_TBKD: torch.Tensor,
    v_TBKD: torch.Tensor,
    out_SBND: torch.Tensor,
    lse_SBN: torch.Tensor,
    *,
    saved: list[Any],
    sums: GradientSums,
    kernel: Kernel,
    scale: float,
) -> None:
    """Adds the share of the given keys to `sums`; output and log-sum-exp are those over all keys."""
    grad, q, k, v, out = (_heads_first(t) for t in (grad_SBND, q_SBND, k_TBKD, v_TBKD, out_SBND))
    lse = lse_SBN.permute(1, 2, 0)
    dq, dk, dv = (_heads_first(t) for t in (sums.dq_SBND, *sums.dkv_2TBKD))
    for at, kept in zip(plan.rectangles, saved, strict=False):
        queries, keys = (at.rows, slice(None), at.q), (at.rows, slice(None), at.k)
        more = kernel.backward(
            *(grad[queries], q[queries], k[keys], v[keys], out[queries], lse[queries], kept),
            is_causal=at.is_causal,
            scale=scale,
        )
        for total, place, part in zip((dq, dk, dv), (queries, keys, keys), more, strict=True):
            total[place] += part
    flat = [t.flatten(0, 1) for t in (grad_SBND, q_SBND, k_TBKD, v_TBKD, out_SBND, lse_SBN)]
    totals = [t.flatten(0, 1) for t in (sums.dq_SBND, *sums.dkv_2TBKD)]
    for pack, kept in zip(plan.packs, saved[len(plan.rectangles) :], strict=True):
        more = _pack_backward(pack, *flat, kept=kept, kernel=kernel, scale=scale)
        indices = (pack.q_index, pack.k_index, pack.k_index)
        for total, index, part in zip(totals, indices, more, strict=True):
            part = part.to(total.dtype)
            # A sum over indices is slow on CUDA, where it adds element by element, atomically.
            total.index_copy_(0, index, part) if plan.is_disjoint else total.index_add_(0, index, part)


def _pack_forward(
    pack: Pack, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, kernel: Any, scale: float
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Output [U, N, D] and log-sum-exp [U, N] of the pack's tokens."""
    q_UND, k_UKD, v_UKD = (
        t.flatten(0, 1)[index] for t, index in ((q, pack.q_index), (k, pack.k_index), (v, pack.k_index))
    )
    if kernel.is_varlen:
        out_UND, lse_NU, kept = kernel.forward_varlen(
            q_UND, k_UKD, v_UKD, offsets=pack.offsets, longest=pack.length, scale=scale
        )
        return out_UND, lse_NU.transpose(0, 1), kept
    pad, unpad = _padding(pack)
    out, lse, kept = kernel.forward(pad(q_UND), pad(k_UKD), pad(v_UKD), is_causal=True, scale=scale)
    return unpad(out), unpad(lse.unsqueeze(-1)).squeeze(-1), kept


def _pack_backward(
    pack: Pack,
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    kept: Any,
    kernel: Any,
    scale: float,
) -> Gradients:
    """Gradients of the pack's tokens from flat tensors of all tokens."""
    grad_UND, q_UND, out_UND, lse_UN = (t[pack.q_index] for t in (grad, q, out, lse))
    k_UKD, v_UKD = k[pack.k_index], v[pack.k_index]
    if kernel.is_varlen:
        gradients: Gradients = kernel.backward_varlen(
            *(grad_UND, q_UND, k_UKD, v_UKD, out_UND, lse_UN.transpose(0, 1), kept),
            offsets=pack.offsets,
            longest=pack.length,
            scale=scale,
        )
        return gradients
    pad, unpad = _padding(pack)
    # Padding queries come after every real one and have no gradient, so they change nothing.
    dq, dk, dv = kernel.backward(
        *(pad(grad_UND), pad(q_UND), pad(k_UKD), pad(v_UKD), pad(out_UND)),
        *(pad(lse_UN.unsqueeze(-1)).squeeze(-1), kept),
        is_causal=True,
        scale=scale,
    )
    return unpad(dq), unpad(dk), unpad(dv)


def _padding(
    pack: Pack,
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """[U, N, D] to [documents, N, length, D] with zeros behind short ones, and back."""

    def pad(x_UND: torch.Tensor) -> torch.Tensor:
        wide = x_UND.new_zeros(pack.count * pack.length, *x_UND.shape[1:])
        wide[pack.slots] = x_UND
        return wide.unflatten(0, (pack.count, pack.length)).transpose(1, 2)

    def unpad(x_BNSD: torch.Tensor) -> torch.Tensor:
        return x_BNSD.transpose(1, 2).flatten(0, 1)[pack.slots]

    return pad, unpad


def _heads_first(x_SBND: torch.Tensor) -> torch.Tensor:
    return x_SBND.permute(1, 2, 0, 3)
