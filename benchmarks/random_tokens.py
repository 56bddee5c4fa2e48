"""A dataset of random tokens, for benchmarks to which text is all the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


def write_tokens(prefix: Path, *, vocab_size: int, documents: int, length: int) -> None:
    """Write `<prefix>.bin` and `.idx`: `documents` of `length` tokens each."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in np.random.default_rng(0).integers(0, vocab_size, (documents, length)):
        builder.add_document(document, [length])
    builder.finalize(f"{prefix}.idx")
