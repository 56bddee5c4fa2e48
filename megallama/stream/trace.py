"""Traces a step of a run back to the text it was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megallama.host.errors import UserError
from megallama.stream.ledger import read_ledger
from megallama.stream.open import INDEX_FOLDER, open_past
from megallama.stream.source import Place
from megallama.stream.stream import Located, SampleStream, token_of
from megallama.tokenizers.files import find_tokenizer
from megallama.tokenizers.load import Tokenizer, load_tokenizer
from megallama.tokens.origins import origin_of

_SHOWN_IDS = 8


@dataclass(frozen=True)
class TracedDocument:
    """Part of a document in a sequence."""

    position: int
    """Where it begins in the sequence."""
    tokens: int
    """How many of its tokens the sequence holds, the last label included."""
    place: Place
    """The first of them."""
    origin: str | None
    """The raw file it was prepared from, and its place there (see `origins`); None where that is not recorded."""
    ids: tuple[int, ...]
    """Its first tokens."""
    text: str | None
    """How that part begins; None without a tokenizer."""


@dataclass(frozen=True)
class TracedSequence:
    """One sequence of a step."""

    row: int
    """Its number in the global batch."""
    sample: int
    """Its number in the run."""
    source: str
    """Path of its source."""
    epoch: int
    """Epoch of that source, from 0."""
    place: int
    """How many sequences of that epoch came before."""
    documents: tuple[TracedDocument, ...]

    def to_plain(self) -> dict[str, Any]:
        """As one line of JSON."""
        return asdict(self)


def trace_step(
    run_dir: Path, *, step: int, rows: range | None = None, chars: int = 60
) -> Iterator[TracedSequence]:
    """The sequences that a step of a run was trained on, in the order of the global batch.

    Args:
        run_dir: Folder of the run.
        step: As the metrics count it: the first one is 1.
        rows: Only these of the global batch.
        chars: Characters of text of each document.

    Raises:
        UserError: no run there, a step or row that is not in it, or data that is gone or has changed.
    """
    stream = _open_stream(run_dir)
    if step < 1:
        raise UserError(f"step ({step}) must be at least 1: metrics count completed steps")
    if step > stream.history.num_steps():
        raise UserError(
            f"step ({step}) is beyond the end of the data (step {stream.history.num_steps():.0f}):"
            " give an earlier one"
        )
    samples = stream.samples(step - 1)
    rows = rows if rows is not None else range(len(samples))
    if not 0 <= rows.start < rows.stop <= len(samples):
        raise UserError(
            f"rows {rows.start} to {rows.stop - 1} are not all in the batch of step {step} ({len(samples)} sequences):"
            f" give numbers from 0 to {len(samples) - 1}"
        )
    tokenizer = _tokenizer(run_dir)
    for row in rows:
        located = stream.locate(samples[row])
        yield TracedSequence(
            row=row,
            sample=samples[row],
            source=located.source.name,
            epoch=located.epoch,
            place=located.place,
            documents=tuple(_documents(stream, located, tokenizer, chars)),
        )


def _open_stream(run_dir: Path) -> SampleStream:
    history = read_ledger(run_dir)
    return SampleStream(history, open_past(history, index_folder=run_dir / INDEX_FOLDER))


def _tokenizer(run_dir: Path) -> Tokenizer | None:
    file = find_tokenizer(run_dir / "tokenizer")
    return load_tokenizer(file) if file is not None else None


def _documents(
    stream: SampleStream, located: Located, tokenizer: Tokenizer | None, chars: int
) -> Iterator[TracedDocument]:
    length = sum(span.count for span in located.spans)
    starts = stream.document_starts(located)
    for start, end in zip(starts, (*starts[1:], length), strict=True):
        place = located.source.place(token_of(located, start))
        # No character is made of more tokens than it has bytes.
        some = [t for view in stream.read(located, start, min(end, start + 4 * chars)) for t in view.tolist()]
        yield TracedDocument(
            position=start,
            tokens=end - start,
            place=place,
            origin=origin_of(place.file, place.document),
            ids=tuple(some[:_SHOWN_IDS]),
            text=None if tokenizer is None else _beginning(tokenizer, some, chars),
        )


def _beginning(tokenizer: Tokenizer, ids: list[int], chars: int) -> str:
    """The first characters of `ids`; a character of which not all bytes are there is left out at both ends."""
    known = [i for i in ids if 0 <= i < tokenizer.vocab_size]
    return tokenizer.decode(known).strip("\N{REPLACEMENT CHARACTER}")[:chars]
