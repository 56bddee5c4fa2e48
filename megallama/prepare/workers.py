"""The worker processes of a preparation: they read text and write tokens themselves and exchange only summaries.

Imports no torch, because every worker process loads this module.
"""

from __future__ import annotations

import errno
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from megallama.corpus.corpus import Reading
from megallama.host.errors import UserError
from megallama.host.threads import one_tokenizer_thread
from megallama.host.utf8 import use_utf8
from megallama.prepare.encoding import Unit, UnitSummary, encode_unit, unit_path
from megallama.tokenizers.interface import Tokenizer
from megallama.tokenizers.load import load_tokenizer

_UNITS_AHEAD = 3


@dataclass(frozen=True)
class Work:
    """What is the same for all units of a preparation."""

    folder: Path
    """Where units go."""
    output: Path
    """What the user calls the output, for messages."""
    tokenizer_path: Path
    tokenizer_identity: tuple[str, int]
    """Its checksum and its end token, which another file may name."""
    begin_id: int | None
    reading: Reading
    seed: int
    max_damaged: int


def encode_units(
    units: Iterable[Unit], work: Work, *, workers: int, tokenizer: Tokenizer
) -> Generator[UnitSummary, None, None]:
    """Summaries of the units in their order; their files lie in `work.folder` then.

    Raises:
        UserError: from reading a document or writing tokens, or because a worker process died.
    """
    if workers <= 1:
        for unit in units:
            yield _encode(unit, work, tokenizer)
        return
    # Spawn, not fork: the caller may hold the threads of torch, whose locks a fork would copy as they are.
    pool = ProcessPoolExecutor(
        max_workers=workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(work,),
    )
    try:
        yield from _in_order(pool, iter(units), ahead=workers * _UNITS_AHEAD)
    except BrokenProcessPool as error:
        raise UserError(
            f"a tokenizing process died ({workers} workers), most likely out of memory: run the same command"
            " again with fewer workers; finished work is kept"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def writing_failed(folder: Path, error: OSError) -> UserError:
    """The error for an output that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"no space left while writing {folder}: free some (up to 7 bytes a token are needed) and run the same"
            " command again, which continues from here, or choose another disk"
        )
    return UserError(f"output {folder} cannot be written ({error.strerror or error}): choose another folder")


def _in_order(pool: ProcessPoolExecutor, units: Iterator[Unit], *, ahead: int) -> Iterator[UnitSummary]:
    waiting: deque[Future[UnitSummary]] = deque()
    for unit in units:
        waiting.append(pool.submit(_encode_in_worker, unit))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _encode(unit: Unit, work: Work, tokenizer: Tokenizer) -> UnitSummary:
    try:
        return encode_unit(
            unit,
            unit_path(work.folder, unit.key),
            tokenizer=tokenizer,
            begin_id=work.begin_id,
            reading=work.reading,
            seed=work.seed,
            max_damaged=work.max_damaged,
        )
    except OSError as error:
        raise writing_failed(work.output, error) from error


_in_worker: tuple[Work, Tokenizer] | None = None


def _start_worker(work: Work) -> None:
    global _in_worker
    use_utf8()
    one_tokenizer_thread()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _in_worker = (work, load_tokenizer(work.tokenizer_path))


def _end_with_parent() -> None:
    # A killed parent leaves the pool's pipes open between the workers, which would wait for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(unit: Unit) -> UnitSummary:
    assert _in_worker is not None
    work, tokenizer = _in_worker
    if (tokenizer.sha256, tokenizer.eod_id) != work.tokenizer_identity:
        raise UserError(f"tokenizer {work.tokenizer_path} changed during the preparation: run it again")
    return _encode(unit, work, tokenizer)
