"""Tokenizing a corpus on many cores: text to token ids, in order, whatever the number of workers.

Imports no torch, because every worker process loads this module.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megallama.data.corpus import STRETCH_BYTES, CorpusFile, Reading, Stretch, cut_stretches, read_documents
from megallama.data.tokenizer import Tokenizer, load_tokenizer
from megallama.host.errors import UserError

_BATCHES_AHEAD = 3


@dataclass(frozen=True)
class EncodedBatch:
    """Documents of some stretches as token ids."""

    tokens: npt.NDArray[np.int32]
    """All documents one after another, each closed by the end-of-document token."""
    lengths: npt.NDArray[np.int64]
    """Tokens of each document."""
    draws: npt.NDArray[np.float64]
    """One number in [0, 1) for each document, a hash of the seed and the document's key."""
    num_bytes: int
    """Bytes of text that were read."""


def draw_of(key: str, *, seed: int) -> float:
    """Number in [0, 1) that depends on nothing but `key` and `seed`."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    # 53 bits, so that the quotient is exact and never rounds up to 1.
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def encode_corpus(
    files: Sequence[CorpusFile],
    *,
    tokenizer: Tokenizer,
    reading: Reading,
    seed: int,
    workers: int,
    stretch_bytes: int = STRETCH_BYTES,
) -> Generator[EncodedBatch, None, None]:
    """The encoded documents of `files` in order; the same for any `workers` and `stretch_bytes`.

    Raises:
        UserError: from reading a document, or because a worker process died.
    """
    batches = _batches(files, reading=reading, stretch_bytes=stretch_bytes)
    total = sum(file.num_bytes for file in files)
    workers = min(workers, -(-total // stretch_bytes))
    if workers <= 1:
        for batch in batches:
            yield _encode_batch(batch, tokenizer=tokenizer, reading=reading, seed=seed)
        return
    # Spawn, not fork: the caller may hold the threads of torch, whose locks a fork would copy as they are.
    pool = ProcessPoolExecutor(
        max_workers=workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(str(tokenizer.path), reading, seed),
    )
    waiting: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_encode_in_worker, batch))
            if len(waiting) > workers * _BATCHES_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"a tokenizing process died ({workers} workers), most likely out of memory: use fewer workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batches(files: Sequence[CorpusFile], *, reading: Reading, stretch_bytes: int) -> Iterator[list[Stretch]]:
    """Stretches in groups of about `stretch_bytes`, so that small files do not each cost a message."""
    group: list[Stretch] = []
    size = 0
    for stretch in cut_stretches(files, reading=reading, stretch_bytes=stretch_bytes):
        group.append(stretch)
        size += stretch.end - stretch.start
        if size >= stretch_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


def _encode_batch(
    stretches: Sequence[Stretch], *, tokenizer: Tokenizer, reading: Reading, seed: int
) -> EncodedBatch:
    parts: list[npt.NDArray[np.int32]] = []
    draws: list[float] = []
    for stretch in stretches:
        for document in read_documents(stretch, reading=reading):
            ids = tokenizer.encode(document.text)
            ids.append(tokenizer.eod_id)
            parts.append(np.array(ids, dtype=np.int32))
            draws.append(draw_of(document.key, seed=seed))
    return EncodedBatch(
        tokens=np.concatenate(parts) if parts else np.zeros(0, np.int32),
        lengths=np.array([part.size for part in parts], dtype=np.int64),
        draws=np.array(draws, dtype=np.float64),
        num_bytes=sum(stretch.end - stretch.start for stretch in stretches),
    )


_in_worker: tuple[Tokenizer, Reading, int] | None = None


def _start_worker(tokenizer_path: str, reading: Reading, seed: int) -> None:
    global _in_worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _in_worker = (load_tokenizer(tokenizer_path), reading, seed)


def _end_with_parent() -> None:
    # A killed parent leaves the pool's pipes open between the workers, which would wait for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(stretches: Sequence[Stretch]) -> EncodedBatch:
    assert _in_worker is not None
    tokenizer, reading, seed = _in_worker
    return _encode_batch(stretches, tokenizer=tokenizer, reading=reading, seed=seed)
