"""Where the documents lie in the sequences of a micro-batch, as attention and rope receive it.

megatron-core hands `packed_seq_params` to every layer and keeps it for recomputation, which happens when other
micro-batches have passed since. Its format stays "sbhd": with "thd" it would drop the batch dimension and expect
Transformer Engine's cut over context-parallel ranks, document by document.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megallama.kernels.attention.plan import DocumentStarts


@dataclass
class DocumentPacking(PackedSeqParams):
    """Documents and positions of one micro-batch: B sequences, L positions of this context-parallel rank."""

    qkv_format: str = "sbhd"
    document_starts: DocumentStarts | None = None
    """Where documents start in each whole sequence; None: each is one document."""
    positions_BS: torch.Tensor | None = None
    """int64 [B, L], or [1, L] for all rows; None: the sequences from 0 on."""
