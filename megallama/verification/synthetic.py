"""Random data and an uneven loss mask for verification, so that no corpus is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megallama.tokens.token_file import write_token_file

MASK_PERIOD = 4
"""Labels that are multiples of this do not count in the loss."""


def write_tokens(prefix: Path, *, num_tokens: int, vocab_size: int, seq_len: int, seed: int) -> None:
    """A `.bin`/`.idx` pair of random documents, some shorter than a sequence, some longer.

    Documents differ in their share of masked labels, so that micro-batches and ranks hold unequal numbers of
    counted tokens: a mean of means is then wrong by more than rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    documents = []
    written = 0
    while written < num_tokens:
        length = int(torch.randint(2, 2 * seq_len, (), generator=generator))
        tokens = torch.randint(0, vocab_size, (length,), generator=generator)
        share = (0.0, 0.3, 0.9)[int(torch.randint(0, 3, (), generator=generator))]
        masked = torch.rand(length, generator=generator) < share
        documents.append(torch.where(masked, tokens // MASK_PERIOD * MASK_PERIOD, tokens).tolist())
        written += length
    write_token_file(prefix, documents)


def with_uneven_mask(batches: Sequence[Any]) -> list[Any]:
    """The micro-batches with the labels that are multiples of MASK_PERIOD left out of the loss.

    A function of each label alone, so it is the same however the batch is cut.
    """
    return [
        None
        if batch is None
        else dataclasses.replace(
            batch, loss_mask_BS=batch.loss_mask_BS * (batch.labels_BS % MASK_PERIOD != 0).to(torch.float32)
        )
        for batch in batches
    ]
