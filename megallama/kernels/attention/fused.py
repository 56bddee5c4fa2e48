"""Attention over one square or rectangle with its log-sum-exp, by the fused kernel of each device.

Partial results over parts of the keys can be merged only with the log-sum-exp, which
`torch.nn.functional.scaled_dot_product_attention` does not return; the operators below it do. They are private to
torch (compat/torch.py): `tests/kernels/attention/test_fused.py` fails when a new version changes them.

Shapes: B sequences, N query heads, K key/value heads (N a multiple of K), S queries, T keys, D head width;
U tokens of several documents one after another. Causal calls have S = T.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from megallama.compat import torch as torch_compat

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Output = tuple[torch.Tensor, torch.Tensor, Any]
"""Attention output [B, N, S, D], log-sum-exp [B, N, S] (natural, scale included), and what backward needs."""


class Kernel(Protocol):
    """One implementation. `is_varlen`: has `forward_varlen` and `backward_varlen` for documents of any lengths."""

    is_varlen: bool

    def forward(
        self,
        q_BNSD: torch.Tensor,
        k_BKTD: torch.Tensor,
        v_BKTD: torch.Tensor,
        *,
        is_causal: bool,
        scale: float,
    ) -> Output:
        """Softmax over the given keys."""

    def backward(
        self,
        grad_BNSD: torch.Tensor,
        q_BNSD: torch.Tensor,
        k_BKTD: torch.Tensor,
        v_BKTD: torch.Tensor,
        out_BNSD: torch.Tensor,
        lse_BNS: torch.Tensor,
        saved: Any,
        *,
        is_causal: bool,
        scale: float,
    ) -> Gradients:
        """Gradients of q, k, v. With output and log-sum-exp over more keys, the share of the given ones."""


class CpuFlash:
    """Flash attention on CPU; grouped heads are native, fp64 to bf16."""

    is_varlen = False

    def forward(
        self,
        q_BNSD: torch.Tensor,
        k_BKTD: torch.Tensor,
        v_BKTD: torch.Tensor,
        *,
        is_causal: bool,
        scale: float,
    ) -> Output:
        """See Kernel."""
        out, lse = torch_compat.cpu_flash_forward(q_BNSD, k_BKTD, v_BKTD, 0.0, is_causal, scale=scale)
        return out, lse, None

    def backward(
        self,
        grad_BNSD: torch.Tensor,
        q_BNSD: torch.Tensor,
        k_BKTD: torch.Tensor,
        v_BKTD: torch.Tensor,
        out_BNSD: torch.Tensor,
        lse_BNS: torch.Tensor,
        saved: Any,
        *,
        is_causal: bool,
        scale: float,
    ) -> Gradients:
        """See Kernel."""
        gradients: Gradients = torch_compat.cpu_flash_backward(
            grad_BNSD, q_BNSD, k_BKTD, v_BKTD, out_BNSD, lse_BNS, 0.0, is_causal, scale=scale
        )
        return gradients


class CudaFlash:
    """Flash attention on CUDA, fp16 and bf16; head widths are padded to a multiple of 8, as the operator asks.

    One operator serves both forms: without offsets it takes [B, S, N, D], with them [U, N, D].
    """

    is_varlen = True

    def forward(
        self,
        q_BNSD: torch.Tensor,
        k_BKTD: torch.Tensor,
        v_BKTD: torch.Tensor,
        *,
        is_causal: bool,
        scale: float,
    ) -> Output:
        """See Kernel."""
        q, k, v = (_pad_width(t.transpose(1, 2), 8) for t in (q_BNSD, k_BKTD, v_BKTD))
        out, lse, seed, offset, _ = torch_compat.cuda_flash_forward(
            q, k, v, None, None, q.size(1), k.size(1), 0.0, is_causal, False, scale=scale
        )
        return out[..., : q_BNSD.size(-1)].transpose(1, 2), lse, (seed, offset)

    def backward(
        self,
        grad_BNSD: torch.Tensor,
        q_BNSD: torch.Tensor,
        k_BKTD: torch.Tensor,
        v_BKTD: torch.Tensor,
        out_BNSD: torch.Tensor,
        lse_BNS: torch.Tensor,
        saved: Any,
        *,
        is_causal: bool,
        scale: float,
    ) -> Gradients:
        """See Kernel."""
        grad, q, k, v, out = (
            _pad_width(t.transpose(1, 2), 8) for t in (grad_BNSD, q_BNSD, k_BKTD, v_BKTD, out_BNSD)
        )
        gradients = torch_compat.cuda_flash_backward(
            *(grad.contiguous(), q, k, v, out.contiguous(), lse_BNS.contiguous()),
            *(None, None, q.size(1), k.size(1), 0.0, is_causal, *saved),
            scale=scale,
        )
        dq, dk, dv = (t[..., : q_BNSD.size(-1)].transpose(1, 2) for t in gradients)
        return dq, dk, dv

    def forward_varlen(
        self,
        q_UND: torch.Tensor,
        k_UKD: torch.Tensor,
        v_UKD: torch.Tensor,
        *,
        offsets: torch.Tensor,
        longest: int,
        scale: float,
    ) -> Output:
        """Causal attention inside each document [offsets[i], offsets[i + 1]); output [U, N, D], lse [N, U]."""
        q, k, v = (_pad_width(t, 8) for t in (q_UND, k_UKD, v_UKD))
        out, lse, seed, offset, _ = torch_compat.cuda_flash_forward(
            q, k, v, offsets, offsets, longest, longest, 0.0, True, False, scale=scale
        )
        return out[..., : q_UND.size(-1)], lse, (seed, offset)

    def backward_varlen(
        self,
        grad_UND: torch.Tensor,
        q_UND: torch.Tensor,
        k_UKD: torch.Tensor,
        v_UKD: torch.Tensor,
        out_UND: torch.Tensor,
        lse_NU: torch.Tensor,
        saved: Any,
        *,
        offsets: torch.Tensor,
        longest: int,
        scale: float,
    ) -> Gradients:
        """Gradients [U, ., D] of `forward_varlen`."""
        grad, q, k, v, out = (_pad_width(t, 8) for t in (grad_UND, q_UND, k_UKD, v_UKD, out_UND))
        gradients = torch_compat.cuda_flash_backward(
            *(grad.contiguous(), q, k, v, out.contiguous(), lse_NU.contiguous()),
            *(offsets, offsets, longest, longest, 0.0, True, *saved),
            scale=scale,
        )
        dq, dk, dv = (t[..., : q_UND.size(-1)] for t in gradients)
        return dq, dk, dv


class CudaEfficient:
    """Memory-efficient attention on CUDA, where flash cannot run: fp32, older devices, wide heads.

    Grouped heads are expanded; the log-sum-exp comes padded to 32 queries.
    """

    is_varlen = False

    def forward(
        self,
        q_BNSD: torch.Tensor,
        k_BKTD: torch.Tensor,
        v_BKTD: torch.Tensor,
        *,
        is_causal: bool,
        scale: float,
    ) -> Output:
        """See Kernel."""
        heads, width = q_BNSD.size(1), q_BNSD.size(-1)
        q, k, v = (_pad_width(t, 8) for t in (q_BNSD, _expand(k_BKTD, heads), _expand(v_BKTD, heads)))
        out, lse, seed, offset = torch_compat.cuda_efficient_forward(
            q, k, v, None, True, 0.0, is_causal, scale=scale
        )
        return out[..., :width], lse[..., : q.size(2)], (seed, offset)

    def backward(
        self,
        grad_BNSD: torch.Tensor,
        q_BNSD: torch.Tensor,
        k_BKTD: torch.Tensor,
        v_BKTD: torch.Tensor,
        out_BNSD: torch.Tensor,
        lse_BNS: torch.Tensor,
        saved: Any,
        *,
        is_causal: bool,
        scale: float,
    ) -> Gradients:
        """See Kernel."""
        heads, width = q_BNSD.size(1), q_BNSD.size(-1)
        grad, q, out = (_pad_width(t, 8) for t in (grad_BNSD, q_BNSD, out_BNSD))
        k, v = (_pad_width(_expand(t, heads), 8) for t in (k_BKTD, v_BKTD))
        # Infinite, as the forward pads it: the backward tells queries that are none by it, without a bound check.
        lse = F.pad(lse_BNS, (0, -q.size(2) % 32), value=math.inf).contiguous()
        dq, dk, dv, _ = torch_compat.cuda_efficient_backward(
            *(grad, q, k, v, None, out, lse, *saved, 0.0, [True, True, True, False], is_causal), scale=scale
        )
        kv_heads = k_BKTD.size(1)
        dk, dv = (t.unflatten(1, (kv_heads, -1)).sum(2) for t in (dk, dv))
        return dq[..., :width], dk[..., :width], dv[..., :width]


class Reference:
    """The formulas with the matrix of one rectangle in memory, on every device; oracle of the others."""

    is_varlen = False

    def forward(
        self,
        q_BNSD: torch.Tensor,
        k_BKTD: torch.Tensor,
        v_BKTD: torch.Tensor,
        *,
        is_causal: bool,
        scale: float,
    ) -> Output:
        """See Kernel."""
        score_BNST = _scores(q_BNSD, k_BKTD, is_causal=is_causal, scale=scale)
        lse_BNS = score_BNST.logsumexp(-1)
        weight_BNST = (score_BNST - lse_BNS.unsqueeze(-1)).exp()
        v_BNTD = _expand(v_BKTD, q_BNSD.size(1)).to(weight_BNST.dtype)
        return (weight_BNST @ v_BNTD).to(q_BNSD.dtype), lse_BNS, None

    def backward(
        self,
        grad_BNSD: torch.Tensor,
        q_BNSD: torch.Tensor,
        k_BKTD: torch.Tensor,
        v_BKTD: torch.Tensor,
        out_BNSD: torch.Tensor,
        lse_BNS: torch.Tensor,
        saved: Any,
        *,
        is_causal: bool,
        scale: float,
    ) -> Gradients:
        """Dao et al. 2022 (arXiv:2205.14135), appendix B.2."""
        heads, kv_heads = q_BNSD.size(1), k_BKTD.size(1)
        score_BNST = _scores(q_BNSD, k_BKTD, is_causal=is_causal, scale=scale)
        weight_BNST = (score_BNST - lse_BNS.unsqueeze(-1)).exp()
        grad, q, out = (t.to(weight_BNST.dtype) for t in (grad_BNSD, q_BNSD, out_BNSD))
        k, v = (_expand(t, heads).to(weight_BNST.dtype) for t in (k_BKTD, v_BKTD))
        mean_BNS = (grad * out).sum(-1)
        d_score_BNST = weight_BNST * (grad @ v.transpose(-1, -2) - mean_BNS.unsqueeze(-1)) * scale
        dk, dv = d_score_BNST.transpose(-1, -2) @ q, weight_BNST.transpose(-1, -2) @ grad
        dk, dv = (t.unflatten(1, (kv_heads, -1)).sum(2) for t in (dk, dv))
        return (d_score_BNST @ k).to(q_BNSD.dtype), dk.to(k_BKTD.dtype), dv.to(v_BKTD.dtype)


def choose_kernel(backend: str, like: torch.Tensor) -> Kernel:
    """The kernel of `backend` ("sdpa" or "reference") for tensors such as `like`."""
    if backend == "reference":
        return Reference()
    if like.device.type == "cpu":
        return CpuFlash()
    if like.device.type != "cuda" or like.dtype == torch.float64:
        return Reference()
    # Flash attention wants Ampere (A100) or newer, half precision, and heads of at most 256.
    is_flash = (
        like.dtype in (torch.float16, torch.bfloat16)
        and like.size(-1) <= 256
        and torch.cuda.get_device_capability(like.device) >= (8, 0)
    )
    return CudaFlash() if is_flash else CudaEfficient()


def _scores(q_BNSD: torch.Tensor, k_BKTD: torch.Tensor, *, is_causal: bool, scale: float) -> torch.Tensor:
    """Scaled and masked scores [B, N, S, T], fp32 at least."""
    dtype = torch.promote_types(q_BNSD.dtype, torch.float32)
    k_BNTD = _expand(k_BKTD, q_BNSD.size(1)).to(dtype)
    score_BNST = (q_BNSD.to(dtype) @ k_BNTD.transpose(-1, -2)) * scale
    if not is_causal:
        return score_BNST
    future_ST = torch.ones(score_BNST.shape[-2:], dtype=torch.bool, device=q_BNSD.device).triu(1)
    return score_BNST.masked_fill(future_ST, -math.inf)


def _expand(x_BKTD: torch.Tensor, heads: int) -> torch.Tensor:
    """Each key/value head once for every query head of its group."""
    repeats = heads // x_BKTD.size(1)
    return x_BKTD if repeats == 1 else x_BKTD.repeat_interleave(repeats, dim=1)


def _pad_width(x: torch.Tensor, multiple: int) -> torch.Tensor:
    missing = -x.size(-1) % multiple
    return F.pad(x, (0, missing)) if missing else x
