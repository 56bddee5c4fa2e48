"""Tokenizers: text to token ids and back, one interface over sentencepiece and Hugging Face files.

Imports no torch: preparation workers and the login node load it in a moment.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from megallama.host.errors import UserError

SENTENCEPIECE_FILE = "tokenizer.model"
HUGGING_FACE_FILE = "tokenizer.json"

# Only asked when no tokenizer_config.json or special_tokens_map.json stands beside tokenizer.json.
_USUAL_END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")
_USUAL_BEGIN_TOKENS = ("<s>", "<|begin_of_text|>", "<bos>")
_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")

sentencepiece.set_min_log_level(2)


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

    def _check_ids(self, ids: Sequence[int]) -> list[int]:
        plain = [int(i) for i in ids]
        if plain and not (min(plain) >= 0 and max(plain) < self.vocab_size):
            raise IndexError(f"token ids must lie in [0, {self.vocab_size}): {min(plain)} .. {max(plain)}")
        return plain


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model`."""

    def __init__(self, path: Path) -> None:
        content = _read(path)
        if _TIKTOKEN_LINE.match(content):
            raise UserError(
                f"tokenizer {path} is a tiktoken list, not a sentencepiece model: use the tokenizer.json that"
                " comes with the Hugging Face form of the same model"
            )
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"tokenizer {path} is not a readable sentencepiece model ({len(content)} bytes):"
                " copy it again or give another file"
            ) from error
        self.path = path
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size = int(self._processor.vocab_size())
        self.name = f"sentencepiece-{self.vocab_size}"
        if self._processor.eos_id() < 0:
            raise _no_end_token(path, "train it with an end-of-text piece (eos_id)")
        self.eod_id = int(self._processor.eos_id())
        self.bos_id = int(self._processor.bos_id()) if self._processor.bos_id() >= 0 else None

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        # Bytes, because sentencepiece's own error for half a surrogate pair does not say what is wrong.
        return list(self._processor.encode(text.encode("utf-8")))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return str(self._processor.decode(self._check_ids(ids)))


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`; the files beside it name the end token, else its usual name does."""

    def __init__(self, path: Path) -> None:
        content = _read(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the binding raises plain Exception for every kind of damage
            raise UserError(
                f"tokenizer {path} is not a readable tokenizer.json ({len(content)} bytes; {error}):"
                " copy it again or give another file"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # "<|endoftext|>" written in a document is text: it must not end the document.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"tokenizer {path} has no tokens: give another file")
        self.path = path
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size = max(vocabulary.values()) + 1
        self.name = f"huggingface-{self.vocab_size}"
        end = _special_token(path, "eos_token", vocabulary, _USUAL_END_TOKENS)
        if end is None:
            raise _no_end_token(path, "put a tokenizer_config.json with its eos_token beside it")
        self.eod_id = end
        self.bos_id = _special_token(path, "bos_token", vocabulary, _USUAL_BEGIN_TOKENS)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        text.encode("utf-8")
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`."""
        for text in texts:
            text.encode("utf-8")
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [list(encoding.ids) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return str(self._tokenizer.decode(self._check_ids(ids), skip_special_tokens=True))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at `path`: a sentencepiece `.model`, a `tokenizer.json`, or a folder that holds one.

    In a folder with both, `tokenizer.json` is taken: the `.model` beside it may be a tiktoken list.

    Raises:
        UserError: missing, damaged, of unknown kind, or without an end-of-text token.
    """
    place = Path(path)
    if place.is_dir():
        held = [place / name for name in (HUGGING_FACE_FILE, SENTENCEPIECE_FILE) if (place / name).is_file()]
        if not held:
            raise UserError(
                f"tokenizer folder {place} holds neither {HUGGING_FACE_FILE} nor {SENTENCEPIECE_FILE}:"
                " give the file itself or another folder"
            )
        place = held[0]
    if not place.exists():
        raise UserError(
            f"tokenizer {place} does not exist: give a .model or tokenizer.json file, or their folder"
        )
    if place.suffix == ".model":
        return SentencePieceTokenizer(place)
    if place.suffix == ".json":
        return HuggingFaceTokenizer(place)
    raise UserError(f"tokenizer {place} is of unknown kind ({place.suffix!r}): give a .model or .json file")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer {path} cannot be read ({error.strerror}): check the file") from error


def _no_end_token(path: Path, remedy: str) -> UserError:
    return UserError(f"tokenizer {path} has no end-of-text token, which must close every document: {remedy}")


def _special_token(path: Path, key: str, vocabulary: dict[str, int], usual: Sequence[str]) -> int | None:
    """Id of the special token `key`: as the side files say, else the first of `usual` that exists."""
    for name in _SIDE_FILES:
        side = path.with_name(name)
        if not side.is_file():
            continue
        try:
            content: Any = json.loads(side.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{side} cannot be read ({error}): mend or remove it") from error
        named = content.get(key) if isinstance(content, dict) else None
        if isinstance(named, dict):
            named = named.get("content")
        if isinstance(named, str):
            if named not in vocabulary:
                raise UserError(f"{side}: {key} ({named!r}) is not in the vocabulary of {path.name}: mend it")
            return vocabulary[named]
    return next((vocabulary[token] for token in usual if token in vocabulary), None)
