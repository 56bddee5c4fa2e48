"""The preparation as a whole: raw text to `.bin`/`.idx`, split into training and validation data."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megallama.corpus.corpus import CorpusFile, Damage, Documents, Reading, empty_corpus, expand_inputs
from megallama.host.errors import UserError
from megallama.prepare.encoding import Unit, UnitSummary, plan_units, read_summary, too_much_damage, unit_path
from megallama.prepare.publishing import WorkFolder, check_output, locked_work
from megallama.prepare.report import (
    PrepareReport,
    SourceReport,
    build_report,
    read_report,
    write_report,
)
from megallama.prepare.token_writer import join_units
from megallama.prepare.workers import Work, encode_units, writing_failed
from megallama.tokenizers.begin import Begin, begin_token
from megallama.tokenizers.load import Tokenizer, load_tokenizer
from megallama.tokens.origins import FILES


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str | Path,
    validation_fraction: float = 0.01,
    seed: int = 1234,
    workers: int | None = None,
    suffixes: Sequence[str] = (),
    documents: Documents = "file",
    separator: str = "",
    text_field: str = "text",
    shard_tokens: int | None = None,
    max_damaged: int = 0,
    begin: Begin = "tokenizer",
    unit_bytes: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PrepareReport:
    """Tokenizes `inputs` into `<output>/train.{bin,idx,json}` and `<output>/valid.{bin,idx,json}`.

    Each document ends with the tokenizer's end-of-document token, and begins with its begin token where `begin` says
    so; the manifests record both. Whether a document is for validation
    is a hash of `seed`, its relative path and its place there, so it does not change when others come or go;
    with two or more documents neither split is empty. With `shard_tokens` a split is `train-00000`,
    `train-00001` ..., each of at most that many tokens. `prepared.json` and `token-counts.npy` tell what is in it.

    The files appear under their names only when all is written; what stood there before stays if anything
    fails. What is tokenized lies in `<output>/.preparing`; the same call goes on from there. The result is the
    same, byte for byte, for any number of `workers` (None: all cores) and any interruption. `unit_bytes` is
    how much text is lost at most by one. A record that gives no document (not UTF-8, no JSON, no text field)
    is an error until `max_damaged` allows that many. `progress` is called with (bytes done, bytes in all).

    Raises:
        UserError: wrong arguments, inputs that `expand_inputs` or `read_records` refuse, too many
            damaged records, existing output without `overwrite`, an empty corpus, a full disk.
    """
    _check_numbers(validation_fraction, workers=workers, shard_tokens=shard_tokens, max_damaged=max_damaged)
    reading = Reading(documents=documents, text_field=text_field, separator=separator)
    folder = Path(output)
    try:
        published = _complete(folder)
        if published is None:
            check_output(folder, overwrite=overwrite)
        loaded = load_tokenizer(tokenizer)
        passed_over: Counter[str] = Counter()
        job = _Job(
            files=expand_inputs(inputs, suffixes=suffixes, text_field=text_field, passed_over=passed_over),
            tokenizer=loaded,
            begin_id=begin_token(loaded, begin),
            reading=reading,
            seed=seed,
            unit_bytes=unit_bytes,
            validation_fraction=validation_fraction,
            shard_tokens=shard_tokens,
            passed_over=passed_over,
        )
        if published is not None:
            if published == job.key:
                return read_report(folder, tokenizer=loaded)
            check_output(folder, overwrite=overwrite)
        count = workers or len(os.sched_getaffinity(0))
        return _prepare(job, folder, max_damaged=max_damaged, workers=count, progress=progress)
    except OSError as error:
        raise writing_failed(folder, error) from error


@dataclass(frozen=True)
class _Job:
    """All that decides about the bytes of the output."""

    files: Sequence[CorpusFile]
    tokenizer: Tokenizer
    begin_id: int | None
    reading: Reading
    seed: int
    unit_bytes: int | None
    validation_fraction: float
    shard_tokens: int | None
    passed_over: Counter[str]
    """Files below the inputs that are not read, by reason."""

    @cached_property
    def units(self) -> list[Unit]:
        """The work."""
        if not any(file.num_bytes for file in self.files):
            raise empty_corpus(self.files)
        planned = plan_units(
            self.files,
            reading=self.reading,
            seed=self.seed,
            tokenizer=self.tokenizer,
            begin_id=self.begin_id,
            unit_bytes=self.unit_bytes,
        )
        return list(planned)

    @cached_property
    def key(self) -> str:
        """Digest of it."""
        names = [(file.source, file.relative) for file in self.files]
        keys = [unit.key for unit in self.units]
        settings = repr((names, keys, self.validation_fraction, self.shard_tokens))
        return hashlib.sha256(settings.encode("utf-8", "surrogateescape")).hexdigest()


def _prepare(
    job: _Job,
    folder: Path,
    *,
    max_damaged: int,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> PrepareReport:
    units, tokenizer = job.units, job.tokenizer
    with locked_work(folder) as work:
        task = Work(
            folder=work.units,
            output=folder,
            tokenizer_path=tokenizer.path,
            tokenizer_identity=(tokenizer.sha256, tokenizer.eod_id),
            begin_id=job.begin_id,
            reading=job.reading,
            seed=job.seed,
            max_damaged=max_damaged,
        )
        tally = _Tally(job.files, max_damaged=max_damaged)
        _tokenize(units, task, tally, tokenizer=tokenizer, workers=workers, progress=progress)
        if tally.documents < (2 if job.validation_fraction else 1):
            work.remove()  # nothing worth keeping
            raise _too_few_documents(job, tally)
        manifests, counts = join_units(
            [unit_path(work.units, unit.key) for unit in units],
            work.start_finishing(),
            files_of=_files_of(units, job.files),
            tokenizer=tokenizer,
            begin_id=job.begin_id,
            validation_fraction=job.validation_fraction,
            shard_tokens=job.shard_tokens,
        )
        report = build_report(
            folder,
            manifests,
            sources=tally.sources.values(),
            tokenizer=tokenizer,
            damaged=tally.damaged,
            passed_over=job.passed_over,
            resumed_bytes=tally.resumed_bytes,
        )
        write_report(work, report, counts)
        _write_names(work, job.files)
        work.publish(job.key)
    return report


def _check_numbers(
    validation_fraction: float, *, workers: int | None, shard_tokens: int | None, max_damaged: int
) -> None:
    if not 0 <= validation_fraction < 1:
        raise UserError(
            f"--validation-fraction ({validation_fraction}) must be in [0, 1): use 0.01, or 0 for no split"
        )
    if workers is not None and workers < 1:
        raise UserError(f"--workers ({workers}) must be at least 1: leave it out to use all cores")
    if shard_tokens is not None and shard_tokens < 1:
        raise UserError(
            f"--shard-tokens ({shard_tokens}) must be at least 1: 1000000000 is usual; leave it out for one file"
        )
    if max_damaged < 0:
        raise UserError(
            f"--max-damaged ({max_damaged}) must be at least 0: 0 stops at the first damaged record"
        )


def _too_few_documents(job: _Job, tally: _Tally) -> UserError:
    if tally.damaged:
        left = (
            "only one document of the corpus is left"
            if tally.documents
            else "no document of the corpus is left"
        )
        return UserError(
            f"{left} (damaged records: {len(tally.damaged):,}); the first problem: {tally.damaged[0].problem}"
        )
    if not tally.documents:
        return empty_corpus(job.files)
    return UserError(
        "the corpus is one document, which cannot be split: give --validation-fraction 0, more"
        " files, or --documents blank_line to cut text files at blank lines"
    )


def _complete(folder: Path) -> str | None:
    """Give the files of a preparation their names that was killed while it did so; the key of its job."""
    if not WorkFolder(folder).is_publishing:
        return None
    with locked_work(folder) as work:
        return work.complete_publishing()


def _files_of(units: Sequence[Unit], files: Sequence[CorpusFile]) -> list[npt.NDArray[np.int64]]:
    """For each unit the number of the file of each stretch."""
    numbers = {file.path: number for number, file in enumerate(files)}
    return [np.array([numbers[part.file.path] for part in unit.stretches], dtype=np.int64) for unit in units]


def _write_names(work: WorkFolder, files: Sequence[CorpusFile]) -> None:
    """`files.json`: the relative path of each file, by number."""
    names = [file.relative for file in files]
    (work.finished / FILES).write_text(
        json.dumps(names, indent=0, ensure_ascii=False) + "\n", encoding="utf-8", errors="surrogateescape"
    )


class _Tally:
    """What is counted on the way."""

    def __init__(self, files: Sequence[CorpusFile], *, max_damaged: int) -> None:
        self.sources: dict[str, SourceReport] = {}
        for file in files:
            source = self.sources.setdefault(file.source, SourceReport(file.source))
            source.files += 1
            source.bytes += file.num_bytes
        self.damaged: list[Damage] = []
        self.resumed_bytes = 0
        self._max_damaged = max_damaged

    @property
    def documents(self) -> int:
        return sum(source.documents for source in self.sources.values())

    def add(self, unit: Unit, summary: UnitSummary) -> None:
        self.sources[unit.stretches[0].file.source].add(summary)
        self.damaged += summary.damaged
        if len(self.damaged) > self._max_damaged:
            raise too_much_damage(self.damaged, count=len(self.damaged), max_damaged=self._max_damaged)


def _tokenize(
    units: Sequence[Unit],
    job: Work,
    tally: _Tally,
    *,
    tokenizer: Tokenizer,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    total = sum(unit.num_bytes for unit in units)
    known = {unit.key: read_summary(unit_path(job.folder, unit.key)) for unit in units}
    missing = [unit for unit in units if known[unit.key] is None]
    tally.resumed_bytes = done = total - sum(unit.num_bytes for unit in missing)
    encoded = encode_units(missing, job, workers=min(workers, len(missing)), tokenizer=tokenizer)
    with closing(encoded):
        for unit, summary in _merged(units, known, encoded):
            tally.add(unit, summary)
            if known[unit.key] is None:
                done += unit.num_bytes
            if progress is not None:
                progress(done, total)


def _merged(
    units: Sequence[Unit], known: dict[str, UnitSummary | None], encoded: Iterator[UnitSummary]
) -> Iterator[tuple[Unit, UnitSummary]]:
    """All units in order with their summary, those that are known and those that are made now."""
    for unit in units:
        yield unit, known[unit.key] or next(encoded)
