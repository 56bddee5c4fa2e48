"""The report of a preparation: printed at its end, and in files beside the tokens."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megallama.corpus.documents import Damage
from megallama.prepare.encoding import UnitSummary
from megallama.prepare.publishing import DAMAGED, TOKEN_COUNTS, WorkFolder
from megallama.tokenizers.load import Tokenizer
from megallama.tokens.manifest import REPORT, TRAIN, VALID, TokenManifest, read_manifest


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
    language_documents: Counter[str] = field(default_factory=Counter)
    """Documents of each likely language."""
    language_bytes: Counter[str] = field(default_factory=Counter)
    """Their UTF-8."""
    damaged: int = 0
    """Records that gave no document."""
    marked_documents: int = 0
    """Documents in which U+2581 stands, which becomes a space."""

    def add(self, summary: UnitSummary) -> None:
        """Count a unit."""
        self.documents += summary.documents
        self.tokens += summary.tokens
        self.text_bytes += summary.text_bytes
        self.characters.update(summary.characters)
        self.language_documents.update(summary.language_documents)
        self.language_bytes.update(summary.language_bytes)
        self.damaged += len(summary.damaged)
        self.marked_documents += summary.marked_documents

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
    begin_id: int | None
    """The token that each document begins with."""
    damaged: tuple[Damage, ...]
    """Records that gave no document."""
    passed_over: Counter[str]
    """Files below the inputs that were not read, by reason."""
    resumed_bytes: int
    """Bytes of the corpus that an earlier attempt had done."""
    was_complete: bool = False
    """An earlier attempt had done all and was interrupted while the files got their names."""

    @property
    def source_files(self) -> int:
        """Files of all sources."""
        return sum(source.files for source in self.sources)

    @property
    def source_bytes(self) -> int:
        """Bytes of all sources on the disk."""
        return sum(source.bytes for source in self.sources)


def build_report(
    folder: Path,
    manifests: Mapping[str, TokenManifest],
    *,
    sources: Iterable[SourceReport],
    tokenizer: Tokenizer,
    damaged: Iterable[Damage],
    passed_over: Mapping[str, int],
    resumed_bytes: int,
    was_complete: bool = False,
) -> PrepareReport:
    """The report on a folder with these splits."""
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
        sources=tuple(sources),
        tokenizer=tokenizer,
        begin_id=manifests[TRAIN].begin_id,
        damaged=tuple(damaged),
        passed_over=Counter(passed_over),
        resumed_bytes=resumed_bytes,
        was_complete=was_complete,
    )


def write_report(work: WorkFolder, report: PrepareReport, counts: npt.NDArray[np.int64]) -> None:
    """`prepared.json`, `token-counts.npy`, `damaged.jsonl`; the same however often it was interrupted."""
    splits = {TRAIN: report.train, VALID: report.validation}
    content = {
        "tokenizer": {
            "name": report.tokenizer.name,
            "sha256": report.tokenizer.sha256,
            "begin_id": report.begin_id,
            "eod_id": report.tokenizer.eod_id,
        },
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
                "languages": {
                    language: {"documents": count, "text_bytes": source.language_bytes[language]}
                    for language, count in sorted(source.language_documents.items())
                },
                "damaged_records": source.damaged,
                "documents_with_u2581": source.marked_documents,
            }
            for source in report.sources
        ],
        "files_passed_over": dict(sorted(report.passed_over.items())),
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


def read_report(folder: Path, *, tokenizer: Tokenizer) -> PrepareReport:
    """The report on what lies in `folder`, from the files that `write_report` wrote."""
    content = json.loads((folder / REPORT).read_text(encoding="utf-8", errors="surrogateescape"))
    manifests = {name: manifest for name in content["splits"] if (manifest := read_manifest(folder / name))}
    sources = [
        SourceReport(
            name=source["input"],
            files=source["files"],
            bytes=source["bytes"],
            documents=source["documents"],
            tokens=source["tokens"],
            text_bytes=source["text_bytes"],
            characters=Counter(source["characters_by_script"]),
            language_documents=Counter({name: n["documents"] for name, n in source["languages"].items()}),
            language_bytes=Counter({name: n["text_bytes"] for name, n in source["languages"].items()}),
            damaged=source["damaged_records"],
            marked_documents=source["documents_with_u2581"],
        )
        for source in content["sources"]
    ]
    damaged = []
    if (folder / DAMAGED).exists():
        lines = (folder / DAMAGED).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        damaged = [Damage(**json.loads(line)) for line in lines]
    return build_report(
        folder,
        manifests,
        sources=sources,
        tokenizer=tokenizer,
        damaged=damaged,
        passed_over=content["files_passed_over"],
        resumed_bytes=sum(source.bytes for source in sources),
        was_complete=True,
    )
