"""The samples of one source: epochs, each a permutation of windows of seq_len + 1 tokens.

`continued`: the source is a ring of tokens, entered at another place in each epoch and cut into windows
with stride seq_len, so the last token of a window (a label there) is the first of the next one (an input
there). What is left before the ring closes, shorter than a window, is dropped: other tokens in each epoch.

`cut`: every window begins with a document and holds the documents that follow it; the last one is cut
where the window ends and what is left of it is not used. Where windows begin is worked out once and kept
in a file (`window_index.py`).

Nothing is in memory for each window or document, and any window of any epoch is found at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from megallama.stream.permutation import Permutation
from megallama.stream.source import TokenSource


@dataclass(frozen=True)
class TokenSpan:
    """Tokens [start, start + count) of a source."""

    start: int
    count: int


@dataclass(frozen=True)
class Cutting:
    """How sources are cut into windows, and in which order they come. Another one starts new epochs."""

    seq_len: int
    """Inputs of a window; it has one token more."""
    seed: int
    """Of the order."""
    is_cut: bool = False
    """Documents end with the window instead of going on in the next one."""
    is_shuffled: bool = True
    """False: windows come in the order of the files, each epoch the same."""


class Windows:
    """The windows of one source under one cutting."""

    def __init__(
        self,
        source: TokenSource,
        cutting: Cutting,
        *,
        starts: Callable[[], npt.NDArray[np.int64]] | None,
    ) -> None:
        """`starts` gives the first token of each window, asked for only where documents are cut.

        None: windows are counted only, not looked at; where documents are cut, `num_windows` is the most there can be.
        """
        self.source = source
        self._cutting = cutting
        self._starts = starts() if cutting.is_cut and starts is not None else None
        self.num_windows = (
            len(self._starts) if self._starts is not None else (source.num_tokens - 1) // cutting.seq_len
        )
        """Samples of one epoch."""
        # Two: around the end of an epoch samples of both are asked for in turn.
        self._order = lru_cache(maxsize=2)(self._build_order)

    def window(self, number: int) -> list[TokenSpan]:
        """The tokens of window `number`, counted over all epochs: one span, two where the ring closes."""
        epoch, place = divmod(number, self.num_windows)
        length = self._cutting.seq_len + 1
        if self._cutting.is_shuffled:
            order, entry = self._order(epoch)
            place = order[place]
        else:
            entry = 0
        if self._starts is not None:
            return [TokenSpan(int(self._starts[place]), length)]
        start = (entry + place * self._cutting.seq_len) % self.source.num_tokens
        before_end = min(length, self.source.num_tokens - start)
        spans = [TokenSpan(start, before_end), TokenSpan(0, length - before_end)]
        return [span for span in spans if span.count]

    def _build_order(self, epoch: int) -> tuple[Permutation, int]:
        key = f"{self._cutting.seed} {self.source.identity} {epoch}"
        entry = int.from_bytes(hashlib.blake2b(f"entry {key}".encode(), digest_size=16).digest(), "little")
        return Permutation(self.num_windows, key=key), entry % self.source.num_tokens
