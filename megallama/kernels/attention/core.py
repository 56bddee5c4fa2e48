"""The core attention module: causal, within documents, over any number of context-parallel ranks.

Shapes: L positions of this rank, S of the whole sequence, B sequences, N query heads, K key/value heads (N a
multiple of K), D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megallama.kernels.attention.context_parallel import RingAttention, WholeKeysAttention, ulysses_attention
from megallama.kernels.attention.fused import choose_kernel
from megallama.kernels.attention.plan import Block, DocumentStarts
from megallama.kernels.attention.transformer_engine import TransformerEngineAttention

BACKENDS = ("sdpa", "reference")
"""In the order in which `auto` prefers them; both run on every device that torch knows."""


@dataclass(frozen=True)
class Attention:
    """softmax(q k^T x scale) v, each query over the keys of its document up to itself."""

    backend: str
    """`sdpa`: torch's fused kernels. `reference`: the formulas."""
    cp_kind: str = "all_gather"
    """How ranks of a context-parallel group share keys: `all_gather`, `ring` or `ulysses`."""

    def __call__(
        self,
        q_LBND: torch.Tensor,
        k_LBKD: torch.Tensor,
        v_LBKD: torch.Tensor,
        *,
        scale: float,
        documents: DocumentStarts | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> torch.Tensor:
        """Output [L, B, N, D].

        Args:
            q_LBND: Queries of this rank's shard, zigzag as `zigzag.stretches` says.
            k_LBKD: Its keys.
            v_LBKD: Its values.
            scale: Factor of the scores.
            documents: Where documents start in the whole sequence; None: every sequence is one document.
            group: The context-parallel group; None or a group of one: no cut.
        """
        is_cut = group is not None and group.size() > 1
        kernel = choose_kernel(self.backend, q_LBND)
        size, rank = (group.size(), group.rank()) if group is not None else (1, 0)
        block = Block(
            documents=documents,
            batch=q_LBND.size(1),
            seq_len=q_LBND.size(0) * size,
            cp_size=size,
            cp_rank=rank,
            is_packing_all=kernel.is_varlen,
            device=q_LBND.device,
        )
        arguments = (q_LBND, k_LBKD, v_LBKD, block, kernel, scale, group if is_cut else None)
        if is_cut and self.cp_kind == "ring":
            out: torch.Tensor = RingAttention.apply(*arguments)
        elif is_cut and self.cp_kind == "ulysses":
            assert group is not None
            out = ulysses_attention(q_LBND, k_LBKD, v_LBKD, block, kernel, scale, group)
        else:
            out = WholeKeysAttention.apply(*arguments)
        return out


def choose_attention(name: str, *, cp_kind: str = "all_gather") -> Attention | TransformerEngineAttention:
    """The backend called `name`, or the first one for `auto`.

    Raises:
        UserError: `name` was asked for and cannot run here.
    """
    if name == "te":
        return TransformerEngineAttention()
    backend = BACKENDS[0] if name == "auto" else name
    assert backend in BACKENDS, name
    return Attention(backend=backend, cp_kind=cp_kind)


def masked_attention(
    q_SBND: torch.Tensor,
    k_SBKD: torch.Tensor,
    v_SBKD: torch.Tensor,
    *,
    scale: float,
    documents: DocumentStarts | None = None,
) -> torch.Tensor:
    """The oracle of everything above: one process, the S x S mask written out. Returns [S, B, N, D]."""
    size, batch, heads, _ = q_SBND.shape
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q_SBND, k_SBKD, v_SBKD))
    repeats = heads // k.size(1)
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    number_BS = torch.zeros(batch, size, dtype=torch.int64, device=q.device)
    for row, starts in enumerate(documents or ()):
        number_BS[row, list(starts)] = 1
    number_BS = number_BS.cumsum(1)
    is_same_BSS = number_BS.unsqueeze(2) == number_BS.unsqueeze(1)
    is_seen_BSS = is_same_BSS & torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    wide = torch.promote_types(q.dtype, torch.float32)
    score = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    weight = score.masked_fill(~is_seen_BSS.unsqueeze(1), float("-inf")).softmax(-1)
    return (weight @ v.to(wide)).to(q_SBND.dtype).permute(2, 0, 1, 3)
