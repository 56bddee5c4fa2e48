"""The interface of every tokenizer, whatever kind of file it comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from megallama.host.errors import UserError

SPACE_MARK = "\u2581"
"""What sentencepiece and its kin write for a space inside a piece."""


class PieceKind(str, Enum):
    """What a token is."""

    normal = "normal"
    """Text that was learnt."""
    byte = "byte"
    """One byte, for text that no piece has."""
    user = "user"
    """Text that is always one token, as somebody wished."""
    special = "special"
    """No text: begin, end, padding, unknown."""
    unused = "unused"
    """An id without a token."""


class Tokenizer(ABC):
    """Text to token ids and back. Special tokens are never read out of text, nor shown by `decode`."""

    name: str
    """Kind and size, for logs: `sentencepiece-32000`."""
    path: Path
    """The file it was loaded from."""
    sha256: str
    """Checksum of that file, hexadecimal."""
    vocab_size: int
    """Number of token ids; every id is below it."""
    eod_id: int
    """End of document (the file's end-of-text token)."""
    bos_id: int | None
    """Begin of text, where the file has one."""
    begins_texts: bool
    """Whether its files say that `bos_id` stands before a text; `begin.begin_token` decides with it."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without begin and end tokens.

        Raises:
            UnicodeEncodeError: the text holds half a surrogate pair.
        """

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens give none, broken UTF-8 gives U+FFFD.

        Raises:
            IndexError: an id outside the vocabulary.
        """

    @abstractmethod
    def kind(self, token: int) -> PieceKind:
        """What token id `token` is."""

    def special_tokens(self) -> dict[str, int]:
        """The special tokens in the order of their ids, by `label`."""
        return {
            self.label(token): token
            for token in range(self.vocab_size)
            if self.kind(token) is PieceKind.special
        }

    @abstractmethod
    def surface(self, token: int) -> bytes:
        """The bytes of text that `token` stands for, a leading space included; none for a special token."""

    @abstractmethod
    def label(self, token: int) -> str:
        """The name of `token` as its file writes it, for reports."""

    @abstractmethod
    def split(self, surface: bytes) -> list[int]:
        """Token ids of `surface` inside of a text: no space is put before it, bytes need not be whole characters."""

    def _check_ids(self, ids: Sequence[int]) -> list[int]:
        plain = [int(i) for i in ids]
        if plain and not (min(plain) >= 0 and max(plain) < self.vocab_size):
            raise IndexError(f"token ids must lie in [0, {self.vocab_size}): {min(plain)} .. {max(plain)}")
        return plain


def read_tokenizer_file(path: Path) -> bytes:
    """The content of a tokenizer file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer {path} cannot be read ({error.strerror}): check the file") from error


def no_end_token(path: Path, remedy: str) -> UserError:
    """The error for a tokenizer that cannot close a document."""
    return UserError(f"tokenizer {path} has no end-of-text token, which must close every document: {remedy}")
