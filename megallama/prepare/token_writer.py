"""Joins the tokens of finished units into token files: training and validation, divided into shards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megallama.prepare.encoding import read_draws, read_unit, token_type
from megallama.tokenizers.interface import Tokenizer
from megallama.tokens.manifest import (
    INDEX_HEADER,
    INDEX_MAGIC,
    TRAIN,
    VALID,
    TokenManifest,
    join_manifests,
    sha256_of,
    shard_name,
    write_manifest,
)
from megallama.tokens.origins import SUFFIX

_LENGTHS_AT_ONCE = 1 << 14
_TOKENS_AT_ONCE = 1 << 18
_TYPE_CODES = {np.dtype(np.uint16): 8, np.dtype(np.int32): 4}


class Lengths:
    """Tokens of each document, kept in a file without a name in `folder`, not in memory."""

    def __init__(self, folder: Path) -> None:
        self.count = 0
        self._stream = TemporaryFile(dir=folder, buffering=1 << 20)  # noqa: SIM115 (closed by close)

    def append(self, lengths: npt.NDArray[np.integer]) -> None:
        """Add those of further documents."""
        self._stream.write(lengths.astype("<i4").data)
        self.count += lengths.size

    def parts(self) -> Iterator[npt.NDArray[np.int32]]:
        """All of them, some ten thousand at a time."""
        self._stream.flush()
        for first in range(0, self.count, _LENGTHS_AT_ONCE):
            count = min(_LENGTHS_AT_ONCE, self.count - first)
            self._stream.seek(4 * first)
            yield np.frombuffer(self._stream.read(4 * count), dtype="<i4")
        self._stream.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Give the disk space back."""
        self._stream.close()


class TokenWriter:
    """One `.bin`/`.idx` pair in megatron-core's format, with manifest, written from arrays.

    megatron-core 0.16.1's builder takes a document a call and keeps Python lists of all lengths; this
    one keeps nothing in memory. `tests/prepare/test_token_writer.py` holds the two to the same bytes.
    """

    def __init__(self, prefix: str | Path, *, tokenizer: Tokenizer, begin_id: int | None = None) -> None:
        self.prefix = str(prefix)
        self.tokens = 0
        self.documents = 0
        self._tokenizer = tokenizer
        self._begin_id = begin_id
        self._dtype = np.dtype(token_type(tokenizer.vocab_size))
        self._digest = hashlib.sha256()
        self.lengths = Lengths(Path(prefix).parent)
        self._stream = open(f"{prefix}.bin", "wb", buffering=1 << 20)  # noqa: SIM115 (closed by __exit__)
        self._origins = open(f"{prefix}{SUFFIX}", "wb", buffering=1 << 20)  # noqa: SIM115

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        self._origins.close()
        self.lengths.close()

    def add(
        self,
        tokens: npt.NDArray[np.integer],
        lengths: npt.NDArray[np.int64],
        origins: npt.NDArray[np.int64],
    ) -> None:
        """Append documents of `lengths` that stand one after another in `tokens`; `origins` is [documents, 2]."""
        assert tokens.size == lengths.sum() and tokens.dtype == self._dtype, (tokens.size, lengths.sum())
        assert origins.shape == (lengths.size, 2), origins.shape
        self._origins.write(np.ascontiguousarray(origins, dtype="<i8").data)
        content = np.ascontiguousarray(tokens).view(np.uint8).data
        self._stream.write(content)
        self._digest.update(content)
        self.lengths.append(lengths)
        self.tokens += tokens.size
        self.documents += lengths.size

    def finish(self) -> TokenManifest:
        """Write index and manifest; everything is on the disk then."""
        for stream in (self._stream, self._origins):
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
        with open(f"{self.prefix}.idx", "wb") as stream:
            for part in index_parts(self.lengths, self._dtype):
                stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
        manifest = TokenManifest(
            tokenizer_name=self._tokenizer.name,
            tokenizer_sha256=self._tokenizer.sha256,
            vocab_size=self._tokenizer.vocab_size,
            eod_id=self._tokenizer.eod_id,
            begin_id=self._begin_id,
            documents=self.documents,
            tokens=self.tokens,
            bin_bytes=self.tokens * self._dtype.itemsize,
            bin_sha256=self._digest.hexdigest(),
            idx_sha256=sha256_of(f"{self.prefix}.idx"),
        )
        write_manifest(self.prefix, manifest)
        return manifest


def index_parts(lengths: Lengths, dtype: np.dtype[Any]) -> Iterator[bytes]:
    """megatron-core's index of documents of these lengths, part after part."""
    yield INDEX_HEADER.pack(INDEX_MAGIC, 1, _TYPE_CODES[dtype], lengths.count, lengths.count + 1)
    for part in lengths.parts():
        yield part.tobytes()
    start = 0
    for part in lengths.parts():
        ends = start + np.cumsum(part, dtype=np.int64)
        yield ((ends - part) * dtype.itemsize).tobytes()
        start = int(ends[-1])
    for first in range(0, lengths.count + 1, _LENGTHS_AT_ONCE):
        end = min(first + _LENGTHS_AT_ONCE, lengths.count + 1)
        yield np.arange(first, end, dtype=np.int64).tobytes()


class ShardedWriter:
    """A split: one token file, or shards of at most `shard_tokens` (a longer document is a shard of its own)."""

    def __init__(
        self, prefix: Path, *, tokenizer: Tokenizer, begin_id: int | None, shard_tokens: int | None
    ) -> None:
        self._prefix = prefix
        self._tokenizer = tokenizer
        self._begin_id = begin_id
        self._dtype = np.dtype(token_type(tokenizer.vocab_size))
        self._shard_tokens = shard_tokens
        self._finished: list[TokenManifest] = []
        # Of the one file that the shards would make, by which the source is known.
        self._digest = hashlib.sha256()
        self._lengths = Lengths(prefix.parent)
        self._writer = self._next_writer()

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)
        self._lengths.close()

    def add(
        self,
        tokens: npt.NDArray[np.integer],
        lengths: npt.NDArray[np.int64],
        origins: npt.NDArray[np.int64],
    ) -> None:
        """As `TokenWriter.add`."""
        if self._shard_tokens is not None:
            self._digest.update(np.ascontiguousarray(tokens).view(np.uint8).data)
        ends = np.cumsum(lengths)
        first, first_token = 0, 0
        while first < lengths.size:
            end = lengths.size
            if self._shard_tokens is not None:
                room = self._shard_tokens - self._writer.tokens
                end = int(np.searchsorted(ends, first_token + room, side="right"))
                if end <= first and self._writer.documents:
                    self._finished.append(self._finish_shard())
                    self._writer = self._next_writer()
                    continue
                end = max(end, first + 1)
            end_token = int(ends[end - 1])
            self._writer.add(tokens[first_token:end_token], lengths[first:end], origins[first:end])
            first, first_token = end, end_token

    def finish(self) -> TokenManifest:
        """Write what is left; the manifest of the whole split."""
        if self._shard_tokens is None:
            return self._writer.finish()
        shards = [*self._finished, self._finish_shard()]
        index = hashlib.sha256()
        for part in index_parts(self._lengths, self._dtype):
            index.update(part)
        whole = join_manifests(shards, bin_sha256=self._digest.hexdigest(), idx_sha256=index.hexdigest())
        write_manifest(self._prefix, whole)
        return whole

    def _finish_shard(self) -> TokenManifest:
        for part in self._writer.lengths.parts():
            self._lengths.append(part)
        manifest = self._writer.finish()
        self._writer.lengths.close()
        return manifest

    def _next_writer(self) -> TokenWriter:
        is_whole = self._shard_tokens is None
        prefix = self._prefix if is_whole else shard_name(self._prefix, len(self._finished))
        return TokenWriter(prefix, tokenizer=self._tokenizer, begin_id=self._begin_id)


def join_units(
    paths: Sequence[Path],
    folder: Path,
    *,
    files_of: Sequence[npt.NDArray[np.int64]],
    tokenizer: Tokenizer,
    begin_id: int | None,
    validation_fraction: float,
    shard_tokens: int | None,
) -> tuple[dict[str, TokenManifest], npt.NDArray[np.int64]]:
    """Writes the units as `folder`/train and, with a fraction above 0, `folder`/valid.

    `begin_id` is the token that each document begins with, for the manifests. `files_of` has for each unit the file
    number of each of its stretches.

    Returns the manifest of each split, and how often each token occurs, int64 [vocab_size].
    """
    moved = _moved(paths, tokenizer.vocab_size, validation_fraction) if validation_fraction else None
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    names = (TRAIN, VALID) if validation_fraction else (TRAIN,)
    writers = {
        name: ShardedWriter(folder / name, tokenizer=tokenizer, begin_id=begin_id, shard_tokens=shard_tokens)
        for name in names
    }
    try:
        for number, path in enumerate(paths):
            first = 0
            for part in read_unit(path, vocab_size=tokenizer.vocab_size):
                origins = np.stack([files_of[number][part.stretches], part.places], axis=1)
                _count(part.tokens, counts)
                is_valid = part.draws < validation_fraction
                if moved is not None and moved[0] == number and 0 <= moved[1] - first < is_valid.size:
                    is_valid[moved[1] - first] ^= True
                for name, chosen in ((TRAIN, ~is_valid), (VALID, is_valid)):
                    if not chosen.any():
                        continue
                    tokens = part.tokens if chosen.all() else part.tokens[np.repeat(chosen, part.lengths)]
                    writers[name].add(tokens, part.lengths[chosen], origins[chosen])
                first += is_valid.size
        return {name: writer.finish() for name, writer in writers.items()}, counts
    finally:
        for writer in writers.values():
            writer.__exit__(None, None, None)


def _count(tokens: npt.NDArray[np.integer], counts: npt.NDArray[np.int64]) -> None:
    """Add how often each token occurs; `bincount` makes eight bytes of each, so some at a time."""
    for first in range(0, tokens.size, _TOKENS_AT_ONCE):
        counts += np.bincount(tokens[first : first + _TOKENS_AT_ONCE], minlength=counts.size)


def _moved(paths: Sequence[Path], vocab_size: int, fraction: float) -> tuple[int, int] | None:
    """(unit, document) that must change sides so that no split is empty: the one nearest to the other side."""
    sides: set[bool] = set()
    nearest: tuple[float, int, int] | None = None
    for number, path in enumerate(paths):
        first = 0
        for draws in read_draws(path, vocab_size=vocab_size):
            sides.update(np.unique(draws < fraction).tolist())
            if len(sides) == 2:
                return None
            distances = np.abs(draws - fraction)
            at = int(np.argmin(distances))
            if nearest is None or distances[at] < nearest[0]:
                nearest = (float(distances[at]), number, first + at)
            first += draws.size
    return nearest[1:] if nearest else None
