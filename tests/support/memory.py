"""Sources in memory whose tokens tell where they stand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megallama.stream.history import History
from megallama.stream.source import Place
from megallama.stream.stream import SampleStream, SourceShelf, build_mix
from megallama.stream.windows import Cutting

NO_FOLDER = Path("nowhere")


class Memory:
    """Documents of consecutive numbers from `first` on."""

    def __init__(self, lengths: Sequence[int], *, name: str = "内存", first: int = 0) -> None:
        self.name = name
        self.identity = f"{name}-{len(lengths)}"
        self.lengths = np.array(lengths, dtype=np.int64)
        self.num_tokens = int(self.lengths.sum())
        self.span = (0, self.num_tokens)
        self._first = first
        self._begins = np.cumsum([0, *lengths[:-1]])

    def views(self, start: int, count: int) -> Iterator[npt.NDArray[np.integer]]:
        assert start >= 0 and start + count <= self.num_tokens
        yield np.arange(self._first + start, self._first + start + count)

    def document_starts(self, start: int, count: int) -> list[int]:
        begins = self._begins[self.lengths > 0]
        return begins[(begins >= start) & (begins < start + count)].tolist()  # type: ignore[no-any-return]

    def document_starts_in_parts(self) -> Iterator[npt.NDArray[np.int64]]:
        for first in range(0, len(self._begins), 3):
            yield self._begins[first : first + 3]

    def place(self, token: int) -> Place:
        document = int(np.searchsorted(self._begins, token, side="right")) - 1
        return Place(self.name, document, token - int(self._begins[document]))


def stream_of(
    *sources: Memory,
    seq_len: int = 4,
    seed: int = 1,
    weights: Sequence[float] | None = None,
    max_epochs: Sequence[float | None] | None = None,
    shuffle: bool = True,
    cut: bool = False,
    batch: int = 1,
    folder: Path = NO_FOLDER,
) -> SampleStream:
    """A stream over `sources` under one mix."""
    shelf = SourceShelf(sources, index_folder=folder)
    cutting = Cutting(seq_len, seed, is_cut=cut, is_shuffled=shuffle)
    caps = max_epochs or [None] * len(sources)
    entries = list(zip(sources, weights or [1.0] * len(sources), caps, strict=True))
    mix = build_mix(shelf, entries, cutting=cutting)
    return SampleStream(History().continued(0, global_batch_size=batch, plan=[(0, mix)]), shelf)
