"""An opened token file: memory-mapped tokens and index, read by document.

Nothing is copied or computed when it is opened: the index of a billion tokens stays on the disk, where
each document's place is one number. What is read is checked, since only a look at it can tell damage.
It needs no torch (megatron-core's own reader does), so that a login node can look into the data of a run.

A mapped file that another process cuts short kills whoever reads beyond its new end (SIGBUS); so its
size is looked at before each reading, which leaves the instant between the look and the reading.
"""

from __future__ import annotations

import bisect
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megallama.host.errors import ConfigError, UserError
from megallama.host.limits import map_file
from megallama.tokens.manifest import (
    INDEX_HEADER,
    NUMBER_FORMATS,
    SUFFIXES,
    TokenManifest,
    check_token_file,
    content_identity,
    read_manifest,
)

_HEADER_BYTES = INDEX_HEADER.size
_TOKENS, _INDEX = 0, 1
"""Places of the two files of a pair."""
_DOCUMENTS_AT_ONCE = 1 << 16
_SAMPLED_BLOCKS = 32
_BLOCK_BYTES = 4096


def write_token_file(prefix: Path, documents: Iterable[Sequence[int]]) -> None:
    """A `.bin`/`.idx` pair of int32 tokens without a manifest, as for a small run made on the spot."""
    # Imported here: it needs torch.
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

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
        self.manifest: TokenManifest | None = read_manifest(prefix)
        tokens, index = map_file(f"{prefix}.bin"), map_file(f"{prefix}.idx")
        self._nodes = tuple(os.stat(f"{prefix}{suffix}").st_ino for suffix in SUFFIXES[:2])
        _, _, code, sequences, entries = INDEX_HEADER.unpack(index[:_HEADER_BYTES])
        self._dtype = np.dtype(NUMBER_FORMATS[code])
        # A document of Megatron's may be several sequences (sentences); they stand one after another in .bin.
        after_lengths = _HEADER_BYTES + 4 * sequences
        self._pointers = np.frombuffer(index, "<i8", count=sequences, offset=after_lengths)
        self._first_sequence = np.frombuffer(
            index, "<i8", count=entries, offset=after_lengths + 8 * sequences
        )
        self._search_pointers, self._search_first = _numbers(self._pointers), _numbers(self._first_sequence)
        last_length = int(np.frombuffer(index, "<i4", count=1, offset=after_lengths - 4)[0])
        last_byte = int(self._pointers[-1]) + last_length * self._dtype.itemsize
        self.num_tokens = last_byte // self._dtype.itemsize
        """Tokens of all documents."""
        self.num_documents = len(self._first_sequence) - 1
        """Number of documents."""
        self._tokens = np.frombuffer(tokens, self._dtype, count=self.num_tokens)
        self._num_bytes = self.num_tokens * self._dtype.itemsize, len(index)

    @cached_property
    def identity(self) -> str:
        """Digest of what the file holds, wherever it lies: its manifest's, else one of samples from all over it."""
        if self.manifest is not None and (stated := content_identity(self.manifest)) is not None:
            return stated
        digest = hashlib.blake2b(digest_size=16)
        for path in (f"{self.name}.idx", f"{self.name}.bin"):
            size = os.path.getsize(path)
            digest.update(f"{size} ".encode())
            with open(path, "rb") as stream:
                for block in range(_SAMPLED_BLOCKS):
                    stream.seek(block * max(0, size - _BLOCK_BYTES) // (_SAMPLED_BLOCKS - 1))
                    digest.update(stream.read(_BLOCK_BYTES))
        return digest.hexdigest()

    @cached_property
    def document_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, 8 bytes of memory each."""
        starts = [*self.document_starts_in_parts(), np.array([self.num_tokens])]
        return np.diff(np.concatenate(starts))

    def document_starts_in_parts(self) -> Iterator[npt.NDArray[np.int64]]:
        """First token of each document, in order, some ten thousand at a time."""
        for first in range(0, self.num_documents, _DOCUMENTS_AT_ONCE):
            yield self.document_starts(first, min(first + _DOCUMENTS_AT_ONCE, self.num_documents))

    def document_starts(self, first: int, end: int) -> npt.NDArray[np.int64]:
        """First token of documents [first, end).

        Raises:
            UserError: the index is damaged there.
        """
        self._check_size(_INDEX)
        sequences = self._first_sequence[first:end].astype(np.int64)
        count = len(self._pointers)
        wrong = np.flatnonzero((sequences < 0) | (sequences > count))
        if wrong.size:
            entry = _HEADER_BYTES + 12 * count + 8 * (first + int(wrong[0]))
            raise self._damaged(entry, f"sequence {sequences[wrong[0]]} of {count}")
        # Documents without a sequence at the end of the file begin where it ends.
        is_inside = sequences < count
        bytes_ = self._pointers[np.where(is_inside, sequences, 0)].astype(np.int64)
        end_byte = self.num_tokens * self._dtype.itemsize
        bytes_ = np.where(is_inside, bytes_, end_byte)
        is_wrong = (bytes_ < 0) | (bytes_ > end_byte) | (bytes_ % self._dtype.itemsize != 0)
        is_wrong[1:] |= np.diff(bytes_) < 0
        wrong = np.flatnonzero(is_wrong)
        if wrong.size:
            entry = _HEADER_BYTES + 4 * count + 8 * int(sequences[wrong[0]])
            document = first + int(wrong[0])
            raise self._damaged(entry, f"document {document} at byte {bytes_[wrong[0]]} of {end_byte}")
        starts: npt.NDArray[np.int64] = bytes_ // self._dtype.itemsize
        return starts

    def document_starts_between(self, start: int, end: int) -> list[int]:
        """Where documents that hold tokens begin among tokens [start, end) of the file; start < end.

        Raises:
            UserError: the index is damaged there.
        """
        first = self.document_at(start - 1) + 1 if start else 0
        stop = self.document_at(end - 1) + 1
        if first >= stop:
            return []
        sequences = self._search_first[first:stop].tolist()
        low, high = sequences[0], sequences[-1]
        bytes_ = self._search_pointers[low : high + 1].tolist() if low >= 0 else []
        size = self._dtype.itemsize
        starts = [byte // size for byte in bytes_]
        is_plain = sequences == list(range(low, high + 1)) and len(bytes_) == len(sequences)
        is_sound = is_plain and bytes_ == sorted(bytes_) and bytes_ == [start * size for start in starts]
        if not (is_sound and start <= starts[0] and starts[-1] < end):
            starts = self.document_starts(first, stop).tolist()
        return list(dict.fromkeys(starts))  # empty documents begin where the next one does

    def document_at(self, token: int) -> int:
        """The document that holds token `token` of the file.

        Raises:
            UserError: the index is damaged on the way there.
        """
        assert 0 <= token < self.num_tokens, (token, self.num_tokens)
        self._check_size(_INDEX)
        sequence = bisect.bisect_right(self._search_pointers, token * self._dtype.itemsize) - 1
        document = bisect.bisect_right(self._search_first, sequence, hi=self.num_documents) - 1
        # A search in numbers that are not in order ends anywhere.
        if document < 0 or not self._start(document) <= token < self._start(document + 1):
            for _ in self.document_starts_in_parts():
                pass  # says what is wrong, unless it lies between two parts
            raise self._damaged(_HEADER_BYTES, f"no document holds token {token}")
        return document

    def view(self, start: int, count: int) -> npt.NDArray[np.integer]:
        """Tokens [start, start + count) of the file, in its own number format, as a view of the mapped file.

        Raises:
            UserError: the file has become shorter since it was opened.
        """
        assert start >= 0 and start + count <= self.num_tokens, (start, count, self.num_tokens)
        self._check_size(_TOKENS)
        return self._tokens[start : start + count]

    def read(self, document: int, *, start: int, count: int) -> npt.NDArray[np.int64]:
        """A copy of tokens [start, start + count) of a document."""
        assert start >= 0 and start + count <= self.document_lengths[document], (document, start, count)
        return np.array(self.view(self._start(document) + start, count), dtype=np.int64)

    def _start(self, document: int) -> int:
        """As `document_starts`, for one and without an array; where the file ends for the one after the last."""
        sequence, count = self._search_first[document], len(self._pointers)
        if sequence == count:
            return self.num_tokens
        byte = self._search_pointers[sequence] if 0 <= sequence < count else -1
        start, rest = divmod(byte, self._dtype.itemsize)
        if rest or not 0 <= start <= self.num_tokens:
            self.document_starts(document, document + 1)  # says what is wrong
        return start

    def _check_size(self, which: int) -> None:
        path = f"{self.name}{SUFFIXES[which]}"
        try:
            found = os.stat(path)
        except OSError:  # its name is gone; what is mapped stays
            return
        size, is_same = found.st_size, found.st_ino == self._nodes[which]
        if is_same and size < self._num_bytes[which]:
            raise UserError(
                f"{path} was truncated while it was in use ({size} bytes,"
                f" {self._num_bytes[which]} when it was opened): copy or prepare it again and resume the run"
            )

    def _damaged(self, entry: int, what: str) -> UserError:
        return UserError(
            f"index {self.name}.idx is damaged (offset {entry}: {what}): prepare or copy the file again"
        )


def _numbers(mapped_int64: npt.NDArray[np.int64]) -> memoryview:
    """The same memory for `bisect`, which asks NumPy's arrays twenty times more slowly."""
    return mapped_int64.view(np.uint8).data.cast("q")
