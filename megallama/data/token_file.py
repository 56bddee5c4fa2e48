"""An opened token file: documents of token ids, memory-mapped through megatron-core's IndexedDataset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megallama.data.prepared import Manifest, check_token_file, read_manifest
from megallama.host.errors import ConfigError


def write_token_file(prefix: Path, documents: Iterable[Sequence[int]]) -> None:
    """A `.bin`/`.idx` pair of int32 tokens without a manifest, as for a small run made on the spot."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for tokens in documents:
        builder.add_document(np.asarray(tokens, dtype=np.int32), [len(tokens)])
    builder.finalize(f"{prefix}.idx")


class TokenFile:
    """Documents of a prepared `<prefix>.bin`/`.idx`; files that Megatron made open as well.

    Raises:
        ConfigError: what `check_token_file` finds.
    """

    def __init__(self, prefix: str | Path) -> None:
        problems = check_token_file(prefix)
        if problems:
            raise ConfigError(problems)
        self.name = str(prefix)
        self.manifest: Manifest | None = read_manifest(prefix)
        self._dataset = IndexedDataset(str(prefix))
        # A document of Megatron's may be several sequences (sentences); they stand one after another in .bin.
        first_sequence = np.asarray(self._dataset.document_indices, dtype=np.int64)
        ends = np.concatenate([[0], np.cumsum(self._dataset.sequence_lengths, dtype=np.int64)])
        self.document_lengths: npt.NDArray[np.int64] = np.diff(ends[first_sequence])
        """Tokens of each document."""
        self._starts = ends[first_sequence]
        self._dtype = self._dataset.index.dtype

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self._starts[-1])

    def read(self, document: int, *, start: int, count: int) -> npt.NDArray[np.int64]:
        """A copy of tokens [start, start + count) of a document."""
        assert start >= 0 and start + count <= self.document_lengths[document], (document, start, count)
        offset = (int(self._starts[document]) + start) * np.dtype(self._dtype).itemsize
        return np.array(
            self._dataset.bin_reader.read(dtype=self._dtype, count=count, offset=offset), dtype=np.int64
        )
