"""Preparation: raw text to megatron-core's `.bin`/`.idx`, split into training and validation data."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megallama.data.corpus import CorpusFile, Damage, Documents, Reading, empty_corpus, expand_inputs
from megallama.data.encoding import Unit, UnitFacts, plan_units, read_facts, too_much_damage, unit_path
from megallama.data.origins import FILES
from megallama.data.prepared import Manifest
from megallama.data.publishing import DAMAGED, REPORT, TOKEN_COUNTS, WorkFolder, check_output, locked_work
from megallama.data.token_writer import TRAIN, VALID, join_units
from megallama.data.tokenizer import Tokenizer, load_tokenizer
from megallama.data.workers import Work, encode_units, writing_failed
from megallama.host.errors import UserError


@dataclass(frozen=True)
class SplitReport:
    """One written split."""

    prefix: Path
    """What `data.sources[].path` takes."""
    documents: int
    tokens: int
    bin_bytes: int
    shards: int
    """Token files; 0: one without a number."""


@dataclass
class SourceReport:
    """What one input gave."""

    name: str
    """The input as it was given."""
    files: int = 0
    bytes: int = 0
    """On the disk."""
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    """UTF-8 of the documents."""
    characters: Counter[str] = field(default_factory=Counter)
    """Characters of each script."""
    damaged: int = 0
    """Records that gave no document."""

    def add(self, facts: UnitFacts) -> None:
        """Count a unit."""
        self.documents += facts.documents
        self.tokens += facts.tokens
        self.text_bytes += facts.text_bytes
        self.characters.update(facts.characters)
        self.damaged += len(facts.damaged)

    @property
    def script_shares(self) -> dict[str, float]:
        """Share of each script among the letters, the largest first."""
        letters = {script: count for script, count in self.characters.items() if script != "none"}
        total = sum(letters.values())
        return {
            script: n / total for script, n in sorted(letters.items(), key=lambda item: (-item[1], item[0]))
        }


@dataclass(frozen=True)
class PrepareReport:
    """What a preparation wrote."""

    train: SplitReport
    validation: SplitReport | None
    """None with validation_fraction 0."""
    sources: tuple[SourceReport, ...]
    tokenizer: Tokenizer
    damaged: tuple[Damage, ...]
    """Records that gave no document."""
    resumed_bytes: int
    """Bytes of the corpus that an earlier attempt had done."""

    @property
    def source_files(self) -> int:
        """Files of all sources."""
        return sum(source.files for source in self.sources)

    @property
    def source_bytes(self) -> int:
        """Bytes of all sources on the disk."""
        return sum(source.bytes for source in self.sources)


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
    unit_bytes: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PrepareReport:
    """Tokenizes `inputs` into `<output>/train.{bin,idx,json}` and `<output>/valid.{bin,idx,json}`.

    Each document ends with the tokenizer's end-of-document token. Whether a document is for validation
    is a hash of `seed` and its relative path (and place, where a file holds many documents), so it
    does not change when other documents come or go; with two or more documents neither split is empty.
    With `shard_tokens` a split is `train-00000`, `train-00001` ..., each of at most that many tokens.
    `prepared.json` and `token-counts.npy` tell what is in it.

    The files appear under their names only when all is written; what stood there before stays if
    anything fails. What is tokenized already lies in `<output>/.preparing`; the same call goes on from
    there. The result is the same, byte for byte, for any number of `workers` (None: all cores) and any
    interruption. `unit_bytes` is how much text is lost at most by one. A record that gives no document
    (not UTF-8, no JSON, no text field) is an error, until `max_damaged` allows to leave out that many;
    `damaged.jsonl` lists them. `progress` is called with (bytes done, bytes in all).

    Raises:
        UserError: wrong arguments, inputs that `expand_inputs` or `read_records` refuse, too many
            damaged records, existing output without `overwrite`, an empty corpus, a full disk.
    """
    _check_numbers(validation_fraction, workers=workers, shard_tokens=shard_tokens, max_damaged=max_damaged)
    reading = Reading(documents=documents, text_field=text_field, separator=separator)
    folder = Path(output)
    try:
        _complete(folder)
        check_output(folder, overwrite=overwrite)
        loaded = load_tokenizer(tokenizer)
        files = expand_inputs(inputs, suffixes=suffixes)
        if not any(file.num_bytes for file in files):
            raise empty_corpus(files)
        with locked_work(folder) as work:
            units = list(
                plan_units(
                    files, reading=reading, seed=seed, tokenizer_sha256=loaded.sha256, unit_bytes=unit_bytes
                )
            )
            job = Work(
                folder=work.units,
                output=folder,
                tokenizer_path=loaded.path,
                tokenizer_sha256=loaded.sha256,
                reading=reading,
                seed=seed,
                max_damaged=max_damaged,
            )
            tally = _Tally(files, max_damaged=max_damaged)
            count = workers or len(os.sched_getaffinity(0))
            _tokenize(units, job, tally, tokenizer=loaded, workers=count, progress=progress)
            if tally.documents < (2 if validation_fraction else 1):
                work.remove()  # nothing worth keeping
                raise _one_document() if tally.documents else empty_corpus(files)
            manifests, counts = join_units(
                [unit_path(work.units, unit.key) for unit in units],
                work.start_finishing(),
                files_of=_files_of(units, files),
                tokenizer=loaded,
                validation_fraction=validation_fraction,
                shard_tokens=shard_tokens,
            )
            report = _report(folder, manifests, tally, tokenizer=loaded)
            _write_facts(work, report, counts)
            _write_names(work, files)
            work.publish()
    except OSError as error:
        raise writing_failed(folder, error) from error
    return report


def _check_numbers(
    validation_fraction: float, *, workers: int | None, shard_tokens: int | None, max_damaged: int
) -> None:
    if not 0 <= validation_fraction < 1:
        raise UserError(
            f"validation_fraction ({validation_fraction}) must be in [0, 1): use 0.01, or 0 for no split"
        )
    if workers is not None and workers < 1:
        raise UserError(f"workers ({workers}) must be at least 1: leave it out to use all cores")
    if shard_tokens is not None and shard_tokens < 1:
        raise UserError(
            f"shard_tokens ({shard_tokens}) must be at least 1: 1000000000 is usual; leave it out for one file"
        )
    if max_damaged < 0:
        raise UserError(
            f"max_damaged ({max_damaged}) must be at least 0: 0 stops at the first damaged record"
        )


def _one_document() -> UserError:
    return UserError(
        "the corpus is one document, which cannot be split: set validation_fraction=0, give more"
        " files, or use documents=blank_line to cut text files at blank lines"
    )


def _complete(folder: Path) -> None:
    """Give the files of a preparation their names that was killed while it did so."""
    if WorkFolder(folder).is_publishing:
        with locked_work(folder) as work:
            work.complete_publishing()


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

    def add(self, unit: Unit, facts: UnitFacts) -> None:
        self.sources[unit.stretches[0].file.source].add(facts)
        self.damaged += facts.damaged
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
    known = {unit.key: read_facts(unit_path(job.folder, unit.key)) for unit in units}
    missing = [unit for unit in units if known[unit.key] is None]
    tally.resumed_bytes = done = total - sum(unit.num_bytes for unit in missing)
    encoded = encode_units(missing, job, workers=min(workers, len(missing)), tokenizer=tokenizer)
    with closing(encoded):
        for unit, facts in _merged(units, known, encoded):
            tally.add(unit, facts)
            if known[unit.key] is None:
                done += unit.num_bytes
            if progress is not None:
                progress(done, total)


def _merged(
    units: Sequence[Unit], known: dict[str, UnitFacts | None], encoded: Iterator[UnitFacts]
) -> Iterator[tuple[Unit, UnitFacts]]:
    """All units in order with their facts, those that are known and those that are made now."""
    for unit in units:
        yield unit, known[unit.key] or next(encoded)


def _report(
    folder: Path, manifests: dict[str, Manifest], tally: _Tally, *, tokenizer: Tokenizer
) -> PrepareReport:
    splits = {
        name: SplitReport(
            prefix=folder / name,
            documents=manifest.documents,
            tokens=manifest.tokens,
            bin_bytes=manifest.bin_bytes,
            shards=manifest.shards,
        )
        for name, manifest in manifests.items()
    }
    return PrepareReport(
        train=splits[TRAIN],
        validation=splits.get(VALID),
        sources=tuple(tally.sources.values()),
        tokenizer=tokenizer,
        damaged=tuple(tally.damaged),
        resumed_bytes=tally.resumed_bytes,
    )


def _write_facts(work: WorkFolder, report: PrepareReport, counts: npt.NDArray[np.int64]) -> None:
    """`prepared.json`, `token-counts.npy`, `damaged.jsonl`; the same however often it was interrupted."""
    splits = {TRAIN: report.train, VALID: report.validation}
    content = {
        "tokenizer": {"name": report.tokenizer.name, "sha256": report.tokenizer.sha256},
        "splits": {
            name: {"documents": split.documents, "tokens": split.tokens, "shards": split.shards}
            for name, split in splits.items()
            if split is not None
        },
        "sources": [
            {
                "input": source.name,
                "files": source.files,
                "bytes": source.bytes,
                "text_bytes": source.text_bytes,
                "documents": source.documents,
                "tokens": source.tokens,
                "characters_by_script": dict(sorted(source.characters.items())),
                "share_of_letters_by_script": {k: round(v, 6) for k, v in source.script_shares.items()},
                "damaged_records": source.damaged,
            }
            for source in report.sources
        ],
        "token_ids_used": int(np.count_nonzero(counts)),
        "token_ids": int(counts.size),
    }
    (work.finished / REPORT).write_text(
        json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", errors="surrogateescape"
    )
    np.save(work.finished / TOKEN_COUNTS, counts)
    if report.damaged:
        with open(work.finished / DAMAGED, "w", encoding="utf-8", errors="surrogateescape") as stream:
            for damage in report.damaged:
                line = {"file": damage.file, "line": damage.line, "problem": damage.problem}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
