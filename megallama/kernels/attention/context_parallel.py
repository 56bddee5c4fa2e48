"""Attention over a sequence that is split over context-parallel ranks, in three ways, each with its own backward.

- all_gather: every rank collects all keys and values (Llama 3, arXiv:2407.21783, section 3.3.2). Simple, and cheap
  where heads are grouped. They are collected again in backward instead of being kept.
- ring: keys and values travel round the ranks while the ones at hand are worked on (Liu et al. 2023,
  arXiv:2310.01889). Never more than two shards in memory.
- ulysses: heads are exchanged for positions, then each rank attends over the whole sequence with its share of
  the heads (Jacobs et al. 2023, arXiv:2309.14509).

Shapes: L local positions of S, B sequences, N query heads, K key/value heads, D head width, P ranks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from megallama.kernels.attention.execution import GradientSums, Partial, run_backward, run_forward
from megallama.kernels.attention.fused import Kernel
from megallama.kernels.attention.plan import Block, Plan, plan_shard_keys, plan_whole_keys
from megallama.kernels.attention.zigzag import to_natural, to_shards


class WholeKeysAttention(torch.autograd.Function):
    """Local queries over the keys of the whole sequence, collected from the group; with one rank, its own."""

    @staticmethod
    def forward(
        ctx: Any,
        q_LBND: torch.Tensor,
        k_LBKD: torch.Tensor,
        v_LBKD: torch.Tensor,
        block: Block,
        kernel: Kernel,
        scale: float,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        """Output [L, B, N, D]."""
        plan = plan_whole_keys(block)
        k_SBKD, v_SBKD = _collect(k_LBKD, group), _collect(v_LBKD, group)
        if plan.is_one_square:
            q, k, v = (t.permute(1, 2, 0, 3) for t in (q_LBND, k_SBKD, v_SBKD))
            out, lse, kept = kernel.forward(q, k, v, is_causal=True, scale=scale)
            out_LBND, lse_LBN, saved = out.permute(2, 0, 1, 3), lse.permute(2, 0, 1), [kept]
        else:
            partial = Partial(q_LBND, is_disjoint=plan.is_disjoint)
            saved = run_forward(plan, q_LBND, k_SBKD, v_SBKD, partial=partial, kernel=kernel, scale=scale)
            out_LBND, lse_LBN = partial.out_SBND.to(q_LBND.dtype), partial.lse_SBN
        ctx.save_for_backward(q_LBND, k_LBKD, v_LBKD, out_LBND, lse_LBN)
        ctx.rest = (plan, kernel, scale, group, saved)
        return out_LBND

    @staticmethod
    def backward(ctx: Any, grad_LBND: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, k, v."""
        plan: Plan
        q_LBND, k_LBKD, v_LBKD, out_LBND, lse_LBN = ctx.saved_tensors
        plan, kernel, scale, group, saved = ctx.rest
        k_SBKD, v_SBKD = _collect(k_LBKD, group), _collect(v_LBKD, group)
        if plan.is_one_square:
            tensors = (grad_LBND, q_LBND, k_SBKD, v_SBKD, out_LBND)
            heads_first = (t.permute(1, 2, 0, 3) for t in tensors)
            parts = kernel.backward(
                *heads_first, lse_LBN.permute(1, 2, 0), saved[0], is_causal=True, scale=scale
            )
            return (*(t.permute(2, 0, 1, 3) for t in parts), None, None, None, None)
        sums = GradientSums(q_LBND, k_SBKD, is_disjoint=plan.is_disjoint)
        run_backward(
            *(plan, grad_LBND, q_LBND, k_SBKD, v_SBKD, out_LBND, lse_LBN),
            saved=saved,
            sums=sums,
            kernel=kernel,
            scale=scale,
        )
        dk_SBKD, dv_SBKD = sums.dkv_2TBKD
        dk_LBKD, dv_LBKD = (_give_back(t, group).to(q_LBND.dtype) for t in (dk_SBKD, dv_SBKD))
        return sums.dq_SBND.to(q_LBND.dtype), dk_LBKD, dv_LBKD, None, None, None, None


class RingAttention(torch.autograd.Function):
    """Local queries over one rank's keys after another's; the next ones are on their way meanwhile."""

    @staticmethod
    def forward(
        ctx: Any,
        q_LBND: torch.Tensor,
        k_LBKD: torch.Tensor,
        v_LBKD: torch.Tensor,
        block: Block,
        kernel: Kernel,
        scale: float,
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        """Output [L, B, N, D]."""
        size, rank = block.cp_size, block.cp_rank
        partial = Partial(q_LBND, is_disjoint=False)
        kv_2LBKD, saved = torch.stack([k_LBKD, v_LBKD]), []
        for step in range(size):
            coming = _Transfer(kv_2LBKD, group) if step + 1 < size else None
            plan = plan_shard_keys(block, (rank - step) % size)
            saved.append(run_forward(plan, q_LBND, *kv_2LBKD, partial=partial, kernel=kernel, scale=scale))
            if coming is not None:
                kv_2LBKD = coming.wait()
        out_LBND = partial.out_SBND.to(q_LBND.dtype)
        ctx.save_for_backward(q_LBND, k_LBKD, v_LBKD, out_LBND, partial.lse_SBN)
        ctx.rest = (block, kernel, scale, group, saved)
        return out_LBND

    @staticmethod
    def backward(ctx: Any, grad_LBND: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, k, v. Those of keys and values travel one step behind these and end at home."""
        q_LBND, k_LBKD, v_LBKD, out_LBND, lse_LBN = ctx.saved_tensors
        block, kernel, scale, group, saved = ctx.rest
        size, rank = block.cp_size, block.cp_rank
        kv_2LBKD = torch.stack([k_LBKD, v_LBKD])
        sums = GradientSums(q_LBND, k_LBKD, is_disjoint=False)
        sums_coming: _Transfer | None = None
        for step in range(size):
            coming = _Transfer(kv_2LBKD, group) if step + 1 < size else None
            sums.clear_keys(k_LBKD)
            run_backward(
                plan_shard_keys(block, (rank - step) % size),
                *(grad_LBND, q_LBND, *kv_2LBKD, out_LBND, lse_LBN),
                saved=saved[step],
                sums=sums,
                kernel=kernel,
                scale=scale,
            )
            total = sums.dkv_2TBKD
            if sums_coming is not None:
                total = total.add_(sums_coming.wait())
            sums_coming = _Transfer(total, group)
            if coming is not None:
                kv_2LBKD = coming.wait()
        assert sums_coming is not None
        dk_LBKD, dv_LBKD = sums_coming.wait().to(k_LBKD.dtype)
        return sums.dq_SBND.to(q_LBND.dtype), dk_LBKD, dv_LBKD, None, None, None, None


def ulysses_attention(
    q_LBND: torch.Tensor,
    k_LBKD: torch.Tensor,
    v_LBKD: torch.Tensor,
    block: Block,
    kernel: Kernel,
    scale: float,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Output [L, B, N, D]. N must be a multiple of P; key/value heads that are not are repeated until they are."""
    size = block.cp_size
    assert q_LBND.size(2) % size == 0, (q_LBND.shape, size)
    repeats = size // math.gcd(size, k_LBKD.size(2))
    if repeats > 1:
        # Query head n uses key head n // (N / K) before and after, as N is a multiple of K x repeats here.
        k_LBKD, v_LBKD = (t.repeat_interleave(repeats, dim=2) for t in (k_LBKD, v_LBKD))
    q, k, v = (_HeadsForPositions.apply(t, group) for t in (q_LBND, k_LBKD, v_LBKD))
    whole = Block(**{**vars(block), "cp_size": 1, "cp_rank": 0})
    out: torch.Tensor = _PositionsForHeads.apply(
        WholeKeysAttention.apply(q, k, v, whole, kernel, scale, None), group
    )
    return out


class _HeadsForPositions(torch.autograd.Function):
    """[L, B, N, D] with all heads to [S, B, N / P, D] with all positions; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, x_LBND: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _to_positions(x_LBND, group)

    @staticmethod
    def backward(ctx: Any, grad_SBND: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _to_heads(grad_SBND, ctx.group), None


class _PositionsForHeads(torch.autograd.Function):
    """The inverse of `_HeadsForPositions`."""

    @staticmethod
    def forward(ctx: Any, x_SBND: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _to_heads(x_SBND, group)

    @staticmethod
    def backward(ctx: Any, grad_LBND: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _to_positions(grad_LBND, ctx.group), None


def _to_positions(x_LBND: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x_PLBND = x_LBND.unflatten(2, (group.size(), -1)).movedim(2, 0).contiguous()
    got = torch.empty_like(x_PLBND)
    dist.all_to_all_single(got, x_PLBND, group=group)
    return to_natural(got)


def _to_heads(x_SBND: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x_PLBND = to_shards(x_SBND, cp_size=group.size()).contiguous()
    got = torch.empty_like(x_PLBND)
    dist.all_to_all_single(got, x_PLBND, group=group)
    return got.movedim(0, 2).flatten(2, 3)


def _collect(x_LBKD: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The whole sequence [S, B, K, D] in natural order from everybody's shard."""
    if group is None:
        return x_LBKD
    x_LBKD = x_LBKD.contiguous()
    flat = x_LBKD.new_empty((group.size() * x_LBKD.size(0), *x_LBKD.shape[1:]))
    dist.all_gather_into_tensor(flat, x_LBKD, group=group)
    return to_natural(flat.unflatten(0, (group.size(), -1)))


def _give_back(x_SBKD: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """This rank's shard [L, B, K, D] of the sum over ranks."""
    if group is None:
        return x_SBKD
    shards = to_shards(x_SBKD, cp_size=group.size())
    own = torch.empty_like(shards[0])
    # gloo takes flat shapes only.
    dist.reduce_scatter_tensor(own.view(-1), shards.view(-1), group=group)
    return own


class _Transfer:
    """A tensor on its way to the next rank, and the previous rank's on its way here."""

    def __init__(self, tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
        ranks, rank = dist.get_process_group_ranks(group), group.rank()
        self._sent = tensor.contiguous()  # kept until the send is done
        self._got = torch.empty_like(self._sent)
        self._requests = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self._sent, ranks[(rank + 1) % len(ranks)], group),
                dist.P2POp(dist.irecv, self._got, ranks[(rank - 1) % len(ranks)], group),
            ]
        )

    def wait(self) -> torch.Tensor:
        """The previous rank's tensor."""
        for request in self._requests:
            request.wait()
        return self._got
