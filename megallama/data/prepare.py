"""Preparation: raw text to megatron-core's `.bin`/`.idx`, split into training and validation data."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megallama.data.corpus import Documents, Reading, empty_corpus, expand_inputs
from megallama.data.encoding import EncodedBatch, encode_corpus
from megallama.data.prepared import SUFFIXES, Manifest, sha256_of, write_manifest
from megallama.data.tokenizer import Tokenizer, load_tokenizer
from megallama.host.errors import UserError

TRAIN = "train"
VALID = "valid"
_WORK_FOLDER = ".preparing-"


@dataclass(frozen=True)
class SplitReport:
    """One written token file."""

    prefix: Path
    """What `data.sources[].path` takes."""
    documents: int
    tokens: int
    bin_bytes: int


@dataclass(frozen=True)
class PrepareReport:
    """What a preparation wrote."""

    train: SplitReport
    validation: SplitReport | None
    """None with validation_fraction 0."""
    source_files: int
    source_bytes: int
    tokenizer: Tokenizer


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
    text_field: str = "text",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PrepareReport:
    """Tokenizes `inputs` into `<output>/train.{bin,idx,json}` and `<output>/valid.{bin,idx,json}`.

    Each document ends with the tokenizer's end-of-document token. Whether a document is for validation
    is a hash of `seed` and its relative path (and byte offset, where a file holds many documents), so it
    does not change when other documents come or go; with two or more documents neither split is empty.
    The files appear under their names only when all is written; what stood there before stays if
    anything fails. The result is the same, byte for byte, for any number of `workers` (None: all cores).
    `progress` is called with (bytes done, bytes in all).

    Raises:
        UserError: wrong arguments, inputs that `expand_inputs` or `read_documents` refuse, existing
            output without `overwrite`, an empty corpus, a full disk.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(
            f"validation_fraction ({validation_fraction}) must be in [0, 1): use 0.01, or 0 for no split"
        )
    if workers is not None and workers < 1:
        raise UserError(f"workers ({workers}) must be at least 1: leave it out to use all cores")
    reading = Reading(documents=documents, text_field=text_field)
    folder = Path(output)
    _check_output(folder, overwrite=overwrite)
    loaded = load_tokenizer(tokenizer)
    files = expand_inputs(inputs, suffixes=suffixes)
    total_bytes = sum(file.num_bytes for file in files)
    if total_bytes == 0:
        raise empty_corpus(files)
    encoded = encode_corpus(
        files, tokenizer=loaded, reading=reading, seed=seed, workers=workers or len(os.sched_getaffinity(0))
    )
    with (
        closing(encoded),
        _work_folder(folder) as work,
        closing(_Splits(work, tokenizer=loaded, validation_fraction=validation_fraction)) as splits,
    ):
        done_bytes = 0
        for batch in encoded:
            splits.add(batch)
            done_bytes += batch.num_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)
        if splits.documents == 0:
            raise empty_corpus(files)
        reports = splits.finish(folder)
        _publish(work, folder)
    return PrepareReport(
        train=reports[TRAIN],
        validation=reports.get(VALID),
        source_files=len(files),
        source_bytes=total_bytes,
        tokenizer=loaded,
    )


class _TokenWriter:
    """One `.bin`/`.idx` pair in the making."""

    def __init__(self, prefix: Path, *, vocab_size: int) -> None:
        self.prefix = prefix
        self.tokens = 0
        self.documents = 0
        self._dtype = DType.optimal_dtype(vocab_size)
        self._digest = hashlib.sha256()
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=self._dtype)

    def add(self, ids: npt.NDArray[np.int32]) -> None:
        row = ids.astype(self._dtype)
        self._builder.add_document(row, [row.size])
        self._digest.update(row.tobytes())
        self.tokens += row.size
        self.documents += 1

    def finish(self, tokenizer: Tokenizer) -> Manifest:
        self._builder.finalize(f"{self.prefix}.idx")
        for suffix in (".bin", ".idx"):
            with open(f"{self.prefix}{suffix}", "rb") as stream:
                os.fsync(stream.fileno())
        manifest = Manifest(
            tokenizer_name=tokenizer.name,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
            documents=self.documents,
            tokens=self.tokens,
            bin_bytes=os.path.getsize(f"{self.prefix}.bin"),
            bin_sha256=self._digest.hexdigest(),
            idx_sha256=sha256_of(f"{self.prefix}.idx"),
        )
        write_manifest(self.prefix, manifest)
        return manifest

    def close(self) -> None:
        # After a full disk the flush fails once more; the first failure has been reported.
        with suppress(OSError):
            self._builder.data_file.close()


class _Splits:
    """Sends each document to training or validation by its draw.

    While only one split has documents, the one nearest to the other side is held back for it; it is
    written where it belongs as soon as the other split has a document of its own.
    """

    def __init__(self, work: Path, *, tokenizer: Tokenizer, validation_fraction: float) -> None:
        self._tokenizer = tokenizer
        self._fraction = validation_fraction
        names = (TRAIN, VALID) if validation_fraction else (TRAIN,)
        self._writers = {name: _TokenWriter(work / name, vocab_size=tokenizer.vocab_size) for name in names}
        self._held: tuple[float, str, npt.NDArray[np.int32]] | None = None
        self._seen: set[str] = set()
        self.documents = 0

    def add(self, batch: EncodedBatch) -> None:
        ends = np.cumsum(batch.lengths)
        for end, length, draw in zip(ends, batch.lengths, batch.draws, strict=True):
            self._add_document(float(draw), batch.tokens[end - length : end])
        self.documents += len(batch.lengths)

    def _add_document(self, draw: float, ids: npt.NDArray[np.int32]) -> None:
        name = VALID if draw < self._fraction else TRAIN
        self._seen.add(name)
        if len(self._seen) == len(self._writers):
            self._release()
            self._writers[name].add(ids)
            return
        distance = abs(draw - self._fraction)
        if self._held is None:
            self._held = (distance, name, ids.copy())
        elif distance < self._held[0]:
            self._release()
            self._held = (distance, name, ids.copy())
        else:
            self._writers[name].add(ids)

    def _release(self) -> None:
        if self._held is not None:
            _, name, ids = self._held
            self._writers[name].add(ids)
            self._held = None

    def finish(self, folder: Path) -> dict[str, SplitReport]:
        if self._held is not None:
            if self.documents < 2:
                raise UserError(
                    "the corpus is one document, which cannot be split: set validation_fraction=0, give more"
                    " files, or use documents=blank_line to cut text files at blank lines"
                )
            _, name, ids = self._held
            other = VALID if name == TRAIN else TRAIN
            self._writers[other].add(ids)
        reports = {}
        for name, writer in self._writers.items():
            manifest = writer.finish(self._tokenizer)
            reports[name] = SplitReport(
                prefix=folder / name,
                documents=manifest.documents,
                tokens=manifest.tokens,
                bin_bytes=manifest.bin_bytes,
            )
        return reports

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


def _final_files(folder: Path) -> list[Path]:
    return [folder / f"{name}{suffix}" for name in (TRAIN, VALID) for suffix in SUFFIXES]


def _check_output(folder: Path, *, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file: name a folder")
    existing = [path.name for path in _final_files(folder) if path.exists()]
    if existing and not overwrite:
        raise UserError(
            f"output {folder} holds prepared data already ({', '.join(existing)}):"
            " choose another folder or set overwrite"
        )


@contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """A folder inside `folder` to write in; it is gone afterwards, and so is `folder` if it was made in vain.

    The lock tells the folder of a living preparation from one that was killed.
    """
    made = not folder.exists()
    work: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        work = Path(tempfile.mkdtemp(prefix=_WORK_FOLDER, dir=folder))
        with open(work / "lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield work
    except OSError as error:
        raise _writing_failed(folder, error) from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _remove_leftovers(folder: Path) -> None:
    for work in folder.glob(f"{_WORK_FOLDER}*"):
        lock_path = work / "lock"
        if lock_path.exists():
            with open(lock_path, "rb") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(
                        f"output {folder} is being written by another preparation: wait for it"
                    ) from None
        shutil.rmtree(work)


def _writing_failed(folder: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"no space left while writing {folder}: free some (about 3 bytes a token) or choose another disk"
        )
    return UserError(f"output {folder} cannot be written ({error.strerror or error}): choose another folder")


def _publish(work: Path, folder: Path) -> None:
    """Moves the finished files to their names, manifests last.

    A machine that dies in between leaves files that disagree with the old manifest, which is noticed.
    """
    finals = sorted(_final_files(folder), key=lambda path: path.suffix == ".json")
    for final in finals:
        made = work / final.name
        if made.exists():
            os.replace(made, final)
        elif final.exists():
            final.unlink()
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
