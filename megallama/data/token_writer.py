"""Finished units joined to token files: training and validation, cut into shards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megallama.data.encoding import open_unit, token_type
from megallama.data.origins import SUFFIX
from megallama.data.prepared import (
    INDEX_HEADER,
    INDEX_MAGIC,
    Manifest,
    join_manifests,
    sha256_of,
    shard_name,
    write_manifest,
)
from megallama.data.tokenizer_interface import Tokenizer

TRAIN = "train"
VALID = "valid"

_TYPE_CODES = {np.dtype(np.uint16): 8, np.dtype(np.int32): 4}


class TokenWriter:
    """One `.bin`/`.idx` pair in megatron-core's format, with manifest, written from arrays.

    megatron-core 0.16.1's builder takes a document a call and keeps Python lists of all lengths; this
    one keeps four bytes a document. `tests/data/test_token_writer.py` holds the two to the same bytes.
    """

    def __init__(self, prefix: str | Path, *, tokenizer: Tokenizer) -> None:
        self.prefix = str(prefix)
        self.tokens = 0
        self.documents = 0
        self._tokenizer = tokenizer
        self._dtype = np.dtype(token_type(tokenizer.vocab_size))
        self._digest = hashlib.sha256()
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._stream = open(f"{prefix}.bin", "wb", buffering=1 << 20)  # noqa: SIM115 (closed by __exit__)
        self._origins = open(f"{prefix}{SUFFIX}", "wb", buffering=1 << 20)  # noqa: SIM115

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        self._origins.close()

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
        self._lengths.append(lengths.astype(np.int32))
        self.tokens += tokens.size
        self.documents += lengths.size

    def finish(self) -> Manifest:
        """Write index and manifest; everything is on the disk then."""
        for stream in (self._stream, self._origins):
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
        with open(f"{self.prefix}.idx", "wb") as stream:
            for part in index_parts(self.lengths(), self._dtype):
                stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
        manifest = Manifest(
            tokenizer_name=self._tokenizer.name,
            tokenizer_sha256=self._tokenizer.sha256,
            vocab_size=self._tokenizer.vocab_size,
            eod_id=self._tokenizer.eod_id,
            documents=self.documents,
            tokens=self.tokens,
            bin_bytes=self.tokens * self._dtype.itemsize,
            bin_sha256=self._digest.hexdigest(),
            idx_sha256=sha256_of(f"{self.prefix}.idx"),
        )
        write_manifest(self.prefix, manifest)
        return manifest

    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each document so far."""
        return np.concatenate(self._lengths) if self._lengths else np.zeros(0, np.int32)


def index_parts(lengths: npt.NDArray[np.int32], dtype: np.dtype[Any]) -> Iterator[bytes]:
    """megatron-core's index of documents of these lengths, part after part."""
    ends = np.cumsum(lengths, dtype=np.int64)
    yield INDEX_HEADER.pack(INDEX_MAGIC, 1, _TYPE_CODES[dtype], lengths.size, lengths.size + 1)
    yield lengths.tobytes()
    yield ((ends - lengths) * dtype.itemsize).tobytes()
    yield np.arange(lengths.size + 1, dtype=np.int64).tobytes()


class ShardedWriter:
    """A split: one token file, or shards of at most `shard_tokens` (a longer document is a shard of its own)."""

    def __init__(self, prefix: Path, *, tokenizer: Tokenizer, shard_tokens: int | None) -> None:
        self._prefix = prefix
        self._tokenizer = tokenizer
        self._dtype = np.dtype(token_type(tokenizer.vocab_size))
        self._shard_tokens = shard_tokens
        self._finished: list[Manifest] = []
        # Of the one file that the shards would make, by which the source is known.
        self._digest = hashlib.sha256()
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._writer = self._next_writer()

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

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

    def finish(self) -> Manifest:
        """Write what is left; the manifest of the whole split."""
        if self._shard_tokens is None:
            return self._writer.finish()
        shards = [*self._finished, self._finish_shard()]
        index = hashlib.sha256()
        for part in index_parts(np.concatenate(self._lengths), self._dtype):
            index.update(part)
        whole = join_manifests(shards, bin_sha256=self._digest.hexdigest(), idx_sha256=index.hexdigest())
        write_manifest(self._prefix, whole)
        return whole

    def _finish_shard(self) -> Manifest:
        self._lengths.append(self._writer.lengths())
        return self._writer.finish()

    def _next_writer(self) -> TokenWriter:
        if self._shard_tokens is None:
            return TokenWriter(self._prefix, tokenizer=self._tokenizer)
        return TokenWriter(shard_name(self._prefix, len(self._finished)), tokenizer=self._tokenizer)


def join_units(
    paths: Sequence[Path],
    folder: Path,
    *,
    files_of: Sequence[npt.NDArray[np.int64]],
    tokenizer: Tokenizer,
    validation_fraction: float,
    shard_tokens: int | None,
) -> tuple[dict[str, Manifest], npt.NDArray[np.int64]]:
    """Writes the units as `folder`/train and, with a fraction above 0, `folder`/valid.

    `files_of` has for each unit the file number of each of its stretches.

    Returns the manifest of each split, and how often each token occurs, int64 [vocab_size].
    """
    moved = _moved(paths, tokenizer.vocab_size, validation_fraction) if validation_fraction else None
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    names = (TRAIN, VALID) if validation_fraction else (TRAIN,)
    writers = {
        name: ShardedWriter(folder / name, tokenizer=tokenizer, shard_tokens=shard_tokens) for name in names
    }
    try:
        for number, path in enumerate(paths):
            unit = open_unit(path, vocab_size=tokenizer.vocab_size)
            origins = np.stack([files_of[number][unit.stretches], unit.places], axis=1)
            counts += np.bincount(unit.tokens, minlength=tokenizer.vocab_size)
            if not validation_fraction:
                writers[TRAIN].add(unit.tokens, unit.lengths, origins)
                continue
            is_valid = unit.draws < validation_fraction
            if moved is not None and moved[0] == number:
                is_valid[moved[1]] = not is_valid[moved[1]]
            for name, chosen in ((TRAIN, ~is_valid), (VALID, is_valid)):
                tokens = unit.tokens[np.repeat(chosen, unit.lengths)]
                writers[name].add(tokens, unit.lengths[chosen], origins[chosen])
        return {name: writer.finish() for name, writer in writers.items()}, counts
    finally:
        for writer in writers.values():
            writer.__exit__(None, None, None)


def _moved(paths: Sequence[Path], vocab_size: int, fraction: float) -> tuple[int, int] | None:
    """(unit, document) that must change sides so that no split is empty: the one nearest to the other side."""
    sides: set[bool] = set()
    nearest: tuple[float, int, int] | None = None
    for number, path in enumerate(paths):
        draws = open_unit(path, vocab_size=vocab_size).draws
        if not draws.size:
            continue
        sides.update((draws < fraction).tolist())
        if len(sides) == 2:
            return None
        distances = np.abs(draws - fraction)
        at = int(np.argmin(distances))
        if nearest is None or distances[at] < nearest[0]:
            nearest = (float(distances[at]), number, at)
    return nearest[1:] if nearest else None
