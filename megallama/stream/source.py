"""A data source: the token files of one dataset joined in order, or a part of them.

Tokens are counted through all files, so a place in a source is one number.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megallama.host.errors import UserError
from megallama.tokens.token_file import TokenFile


@dataclass(frozen=True)
class Place:
    """Where a token stands."""

    file: str
    """Prefix of the token file."""
    document: int
    """Document of that file."""
    offset: int
    """Token of that document."""


class TokenSource(Protocol):
    """What a stream reads: `JoinedSource`, or documents in memory."""

    name: str
    identity: str
    num_tokens: int
    span: tuple[int, int]

    def views(self, start: int, count: int) -> Iterator[npt.NDArray[np.integer]]:
        """Tokens [start, start + count), in one part where they lie together."""

    def document_starts(self, start: int, count: int) -> list[int]:
        """Where documents begin among tokens [start, start + count)."""

    def document_starts_in_parts(self) -> Iterator[npt.NDArray[np.int64]]:
        """Where all documents begin, in order, a bounded number at a time."""

    def place(self, token: int) -> Place:
        """Where token `token` stands."""


class JoinedSource:
    """Tokens [first, end) of some token files joined in their order."""

    def __init__(
        self,
        name: str,
        files: Sequence[TokenFile],
        *,
        first: int = 0,
        end: int | None = None,
        content: str | None = None,
    ) -> None:
        """`content` is the identity of all that the files hold, where it is known to be more than their parts."""
        self.name = name
        self.content = content
        self._files = tuple(files)
        self._ends = np.cumsum([file.num_tokens for file in files]).tolist()
        whole = int(self._ends[-1])
        self._first, self._end = first, whole if end is None else end
        assert 0 <= self._first < self._end <= whole, (first, end, whole)
        self.span = (self._first, self._end)
        self.num_tokens = self._end - self._first
        parts = [content] if content is not None else [file.identity for file in files]
        if self.num_tokens < whole:
            parts.append(f"{self._first}-{self._end}")
        self.identity = (
            parts[0]
            if len(parts) == 1
            else hashlib.blake2b(" ".join(parts).encode(), digest_size=16).hexdigest()
        )

    def views(self, start: int, count: int) -> Iterator[npt.NDArray[np.integer]]:
        """See `TokenSource`; the parts are views of the mapped files."""
        assert start >= 0 and start + count <= self.num_tokens, (start, count, self.num_tokens)
        token, end = self._first + start, self._first + start + count
        while token < end:
            number = bisect.bisect_right(self._ends, token)
            stop = min(end, self._ends[number])
            yield self._files[number].view(token - self._offset(number), stop - token)
            token = stop

    def document_starts(self, start: int, count: int) -> list[int]:
        """See `TokenSource`.

        Raises:
            UserError: an index is damaged there.
        """
        found: list[int] = []
        token, end = self._first + start, self._first + start + count
        while token < end:
            number = bisect.bisect_right(self._ends, token)
            offset, stop = self._offset(number), min(end, self._ends[number])
            starts = self._files[number].document_starts_between(token - offset, stop - offset)
            found += [start + offset - self._first for start in starts]
            token = stop
        return found

    def document_starts_in_parts(self) -> Iterator[npt.NDArray[np.int64]]:
        """See `TokenSource`."""
        for number, file in enumerate(self._files):
            offset = self._offset(number)
            for starts in file.document_starts_in_parts():
                starts = starts + offset
                yield starts[(starts >= self._first) & (starts < self._end)] - self._first

    def place(self, token: int) -> Place:
        """See `TokenSource`."""
        token += self._first
        number = bisect.bisect_right(self._ends, token)
        file, local = self._files[number], token - self._offset(number)
        document = file.document_at(local)
        start = int(file.document_starts(document, document + 1)[0])
        return Place(file=file.name, document=document, offset=local - start)

    def _offset(self, number: int) -> int:
        return int(self._ends[number - 1]) if number else 0


def cut_for_validation(
    source: JoinedSource, files: Sequence[TokenFile], fraction: float
) -> tuple[JoinedSource, JoinedSource]:
    """The source without its last documents, and these: about `fraction` of its tokens.

    Raises:
        UserError: one of the two would be empty.
    """
    wanted = source.num_tokens - max(1, round(source.num_tokens * fraction))
    place = source.place(wanted)
    cut = wanted - place.offset
    if cut == 0:
        raise UserError(
            f"validation_fraction ({fraction}) of data source {source.name} leaves no document to train on:"
            " lower it, or give validation data of its own"
        )
    return (
        JoinedSource(source.name, files, end=cut, content=source.content),
        JoinedSource(source.name, files, first=cut, content=source.content),
    )
