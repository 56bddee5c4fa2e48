"""Statistics of token files that need no model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megallama.tokens.token_file import TokenFile


def token_counts(prefix: str, *, vocab_size: int) -> npt.NDArray[np.int64]:
    """How often each id occurs in the token file at `prefix`; int64 [vocab_size]."""
    file = TokenFile(prefix)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for document in range(file.num_documents):
        tokens = file.read(document, start=0, count=int(file.document_lengths[document]))
        counts += np.bincount(tokens, minlength=vocab_size)
    return counts


def unigram_loss(train_prefix: str, validation_prefix: str, *, vocab_size: int) -> float:
    """Loss in nats of guessing validation tokens by their training frequency alone (add-one smoothed).

    What a model knows beyond word counts is what it is below this.
    """
    train = token_counts(train_prefix, vocab_size=vocab_size) + 1
    validation = token_counts(validation_prefix, vocab_size=vocab_size)
    log_probability = np.log(train / train.sum())
    return float(-(validation * log_probability).sum() / validation.sum())
