"""The sample stream: sample i as a pure function of the run's history and i."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megallama.host.errors import ConfigError, UserError
from megallama.stream.blend import MAX_PERIOD, is_blendable
from megallama.stream.history import History, Mix, MixSource
from megallama.stream.source import TokenSource
from megallama.stream.window_index import load_window_starts
from megallama.stream.windows import Cutting, TokenSpan, Windows


@dataclass(frozen=True)
class Located:
    """Where the tokens of a sample come from."""

    source: TokenSource
    epoch: int
    """Epoch of that source, from 0."""
    place: int
    """How many samples of that epoch came before."""
    spans: tuple[TokenSpan, ...]
    """Its seq_len + 1 tokens, in order; two spans where the ring of tokens closes."""


class SourceShelf:
    """The opened sources of a run by their identity, and their windows."""

    def __init__(self, sources: Sequence[TokenSource], *, index_folder: Path | None) -> None:
        """`index_folder` keeps where windows begin when documents are cut; None: they are only counted."""
        self._sources: Mapping[str, TokenSource] = {source.identity: source for source in sources}
        self._index_folder = index_folder
        self._windows: dict[tuple[str, Cutting], Windows] = {}

    def windows(self, identity: str, cutting: Cutting, *, path: str) -> Windows:
        """The windows of a source.

        Raises:
            UserError: it is not open (`path` names it), or shorter than one window.
        """
        key = (identity, cutting)
        if key not in self._windows:
            source = self._sources.get(identity)
            if source is None:
                raise UserError(
                    f"data source {path} is not open, though earlier samples came from it: put it back"
                )
            folder = self._index_folder
            starts = None if folder is None else partial(_window_starts, source, cutting, folder)
            windows = Windows(source, cutting, starts=starts)
            if windows.num_windows == 0:
                raise UserError(
                    f"data source {source.name} is too short ({source.num_tokens} tokens) for one sample of"
                    f" seq_len + 1 ({cutting.seq_len + 1}) tokens: prepare more text or lower train.seq_len"
                )
            self._windows[key] = windows
        return self._windows[key]


def _window_starts(source: TokenSource, cutting: Cutting, folder: Path) -> npt.NDArray[np.int64]:
    return load_window_starts(source, seq_len=cutting.seq_len, folder=folder)


class SampleStream:
    """The samples of a history, each seq_len + 1 tokens."""

    def __init__(self, history: History, shelf: SourceShelf) -> None:
        self.history = history
        self._shelf = shelf

    @property
    def epoch_samples(self) -> list[int]:
        """Samples of one epoch of each source of the last mix."""
        return [source.num_windows for source in self.history.segments[-1].mix.sources]

    def samples(self, step: int) -> range:
        """The samples of a step (from 0)."""
        return self.history.samples(step)

    def identify(self, sample: int) -> tuple[str, int, int]:
        """(path of the source, epoch of that source from 0, how many samples of that epoch came before)."""
        entry, number = self.history.segment(sample).draw(sample)
        return (entry.path, *divmod(number, entry.num_windows))

    def locate(self, sample: int) -> Located:
        """Where the tokens of a sample come from."""
        segment = self.history.segment(sample)
        entry, number = segment.draw(sample)
        windows = self._shelf.windows(entry.identity, segment.mix.cutting, path=entry.path)
        epoch, place = divmod(number, windows.num_windows)
        return Located(windows.source, epoch, place, tuple(windows.window(number)))

    def read(self, located: Located, start: int, stop: int) -> Iterator[npt.NDArray[np.integer]]:
        """Tokens [start, stop) of a located sample, as views of the mapped files."""
        for span in located.spans:
            first, end = max(start, 0), min(stop, span.count)
            if first < end:
                yield from located.source.views(span.start + first, end - first)
            start, stop = start - span.count, stop - span.count

    def sample(self, sample: int) -> npt.NDArray[np.int64]:
        """All tokens of a sample, a copy of shape [seq_len + 1]."""
        located = self.locate(sample)
        length = sum(span.count for span in located.spans)
        return np.concatenate(list(self.read(located, 0, length))).astype(np.int64)

    def document_starts(self, located: Located) -> list[int]:
        """Where documents begin among the seq_len + 1 tokens; 0 first, whatever lies there."""
        starts, offset = [0], 0
        for span in located.spans:
            found = located.source.document_starts(span.start, span.count)
            starts += [offset + start - span.start for start in found]
            offset += span.count
        return sorted(set(starts))


def token_of(located: Located, place: int) -> int:
    """Token of the source that is token `place` of a located sample."""
    for span in located.spans:
        if place < span.count:
            return span.start + place
        place -= span.count
    raise AssertionError(place)


def build_mix(
    shelf: SourceShelf,
    entries: Sequence[tuple[TokenSource, float, float | None]],
    *,
    cutting: Cutting,
) -> Mix:
    """The mix of (source, weight, epochs after which it leaves or None); sources of weight 0 are not in it.

    Raises:
        ConfigError: no source, a weight that is none, sources with the same content or shorter than one window; all
            of it at once.
    """
    problems: list[str] = []
    sources: dict[str, MixSource] = {}
    for source, weight, max_epochs in entries:
        if not (math.isfinite(weight) and weight >= 0):
            problems.append(
                f"weight of data source {source.name} ({weight}) must be a finite number of at least 0:"
                " change it or leave the source out"
            )
        elif weight > 0 and source.identity in sources:
            problems.append(
                f"data sources {sources[source.identity].path} and {source.name} hold the same data:"
                " leave one out and give the other both weights"
            )
        elif weight > 0:
            try:
                windows = shelf.windows(source.identity, cutting, path=source.name)
            except UserError as error:
                problems.append(str(error))
                continue
            sources[source.identity] = MixSource(
                source.identity,
                source.name,
                weight,
                num_windows=windows.num_windows,
                span=source.span,
                max_epochs=max_epochs,
            )
    if not sources and not problems:
        problems.append(f"no data source with a weight above 0 ({len(entries)} given): set data.sources")
    if sources and not is_blendable([source.weight for source in sources.values()]):
        least = min(sources.values(), key=lambda source: source.weight)
        problems.append(
            f"weight of data source {least.path} ({least.weight}) is less than one sample in {MAX_PERIOD}:"
            " raise it, or join the source with another one"
        )
    if problems:
        raise ConfigError(problems)
    return Mix(cutting, tuple(sorted(sources.values(), key=lambda source: source.identity)))
