"""Core attention on NVIDIA Transformer Engine (CUDA, bf16 or fp16), for sequences that are not split over ranks.

Every document is a sequence of its own in Transformer Engine's packed format (`thd`), so no mask exists and cuDNN or
flash attention is chosen by the library. Its context parallelism cuts every packed document into chunks, where this
project cuts the whole sequence (`zigzag`), so it is not used: `check` refuses it with parallel.cp > 1.

Written against the interface of Transformer Engine 2.x. `tests/kernels/attention/test_transformer_engine.py` holds
the packing against a stand-in with that interface; on a GPU it has not been run yet.

Shapes: S positions, B sequences, N query heads, K key/value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from megallama.kernels.attention.plan import DocumentStarts, to_device
from megallama.kernels.named import require


@dataclass(frozen=True)
class TransformerEngineAttention:
    """softmax(q k^T x scale) v, each query over the keys of its document up to itself.

    Raises:
        UserError: it was asked for and cannot run here.
    """

    backend: str = "te"
    _modules: dict[tuple[int, int, int, float], Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        require("attention", self.backend)

    def __call__(
        self,
        q_SBND: torch.Tensor,
        k_SBKD: torch.Tensor,
        v_SBKD: torch.Tensor,
        *,
        scale: float,
        documents: DocumentStarts | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> torch.Tensor:
        """Output [S, B, N, D]; arguments as `kernels.attention.Attention`'s, with whole sequences."""
        assert group is None or group.size() == 1, "check refuses te with parallel.cp > 1"
        size, batch, heads, width = q_SBND.shape
        offsets, longest = document_offsets(documents, batch=batch, seq_len=size, device=q_SBND.device)
        # Rows one after another, so that every document is a run of tokens.
        q, k, v = (t.transpose(0, 1).flatten(0, 1).contiguous() for t in (q_SBND, k_SBKD, v_SBKD))
        out = self._module(heads, k.size(1), width, scale)(
            *(q, k, v),
            qkv_format="thd",
            cu_seqlens_q=offsets,
            cu_seqlens_kv=offsets,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            attn_mask_type="padding_causal",
        )
        return out.reshape(batch, size, heads, width).transpose(0, 1)

    def _module(self, heads: int, kv_heads: int, width: int, scale: float) -> Any:
        """Transformer Engine's module for these sizes. It has no weights, and is kept out of the model's modules."""
        key = (heads, kv_heads, width, scale)
        if key not in self._modules:
            from transformer_engine.pytorch import DotProductAttention

            self._modules[key] = DotProductAttention(
                heads,
                width,
                num_gqa_groups=kv_heads,
                attention_dropout=0.0,
                qkv_format="thd",
                attn_mask_type="padding_causal",
                softmax_scale=scale,
            )
        return self._modules[key]


@lru_cache(maxsize=64)
def document_offsets(
    documents: DocumentStarts | None, *, batch: int, seq_len: int, device: torch.device
) -> tuple[torch.Tensor, int]:
    """Where each document begins among the tokens of all rows, and the end: int32 [documents + 1]; and the longest."""
    rows = documents if documents is not None else ((0,),) * batch
    assert len(rows) == batch, (len(rows), batch)
    begins = [row * seq_len + start for row, starts in enumerate(rows) for start in starts]
    offsets = [*begins, batch * seq_len]
    longest = max(end - begin for begin, end in zip(offsets, offsets[1:], strict=False))
    return to_device(torch.tensor(offsets, dtype=torch.int32), device), longest
