"""The merges of a byte-pair encoding whose file only says how early each token is made.

tiktoken and sentencepiece join, again and again, the two neighbours whose union is the earliest token, and of equal
ones the leftmost. A `tokenizer.json` lists pairs instead. One pair a token is enough: the parts of a token in a text
are joined in the same order as when the token stands alone, since nothing outside of it has joined with a part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

Text = TypeVar("Text", str, bytes)


def list_merges(tokens: Iterable[Text], order: Callable[[Text], float | None]) -> list[tuple[Text, Text]]:
    """The last pair of each of `tokens`, in their order; nothing for one that no merges reach.

    Args:
        tokens: Those that are merged, the earliest first.
        order: The smaller, the earlier a token is made; None for what is no token.
    """
    pairs = (_last_pair(token, order) for token in tokens if len(token) > 1)
    return [pair for pair in pairs if pair is not None]


def _last_pair(token: Text, order: Callable[[Text], float | None]) -> tuple[Text, Text] | None:
    parts = [token[i : i + 1] for i in range(len(token))]
    orders = [order(one + other) for one, other in zip(parts, parts[1:], strict=False)]
    while len(parts) > 2:
        at, best = -1, float("inf")
        for place, found in enumerate(orders):
            if found is not None and found < best:
                at, best = place, found
        if at < 0:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del orders[at]
        if at > 0:
            orders[at - 1] = order(parts[at - 1] + parts[at])
        if at < len(orders):
            orders[at] = order(parts[at] + parts[at + 1])
    return (parts[0], parts[1])
