"""Loads tokenizers from sentencepiece, Hugging Face and tiktoken files.

Imports no torch: preparation workers and the login node load it in a moment.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

import tokenizers
from megallama.host.errors import UserError
from megallama.tokenizers.begin import is_begin_asked_beside
from megallama.tokenizers.files import locate_tokenizer, said_beside
from megallama.tokenizers.interface import (
    SPACE_MARK,
    PieceKind,
    Tokenizer,
    no_end_token,
    read_tokenizer_file,
)
from megallama.tokenizers.rank_files import RankTokenizer, is_rank_file
from megallama.tokenizers.word_cache import WordCache

# Only asked when no tokenizer_config.json or special_tokens_map.json stands beside tokenizer.json.
_USUAL_END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")
_USUAL_BEGIN_TOKENS = ("<s>", "<|begin_of_text|>", "<bos>")

sentencepiece.set_min_log_level(2)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model`."""

    def __init__(self, path: Path) -> None:
        content = read_tokenizer_file(path)
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
            raise no_end_token(path, "train it with an end-of-text piece (eos_id)")
        self.eod_id = int(self._processor.eos_id())
        self.bos_id = int(self._processor.bos_id()) if self._processor.bos_id() >= 0 else None
        self.begins_texts = is_begin_asked_beside(path)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        # Bytes, because sentencepiece's own error for half a surrogate pair does not say what is wrong.
        return list(self._processor.encode(text.encode("utf-8")))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`."""
        return self._words.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return str(self._processor.decode(self._check_ids(ids)))

    def kind(self, token: int) -> PieceKind:
        """See `Tokenizer`."""
        if self._processor.is_byte(token):
            return PieceKind.byte
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return PieceKind.special
        if self._processor.is_unused(token):
            return PieceKind.unused
        return PieceKind.user if token in self._user_ids else PieceKind.normal

    def surface(self, token: int) -> bytes:
        """See `Tokenizer`."""
        kind, piece = self.kind(token), self.label(token)
        if kind is PieceKind.byte:
            return bytes([int(piece[1:-1], 16)])
        if kind in (PieceKind.special, PieceKind.unused):
            return b""
        return piece.replace(SPACE_MARK, " ").encode()

    def label(self, token: int) -> str:
        """See `Tokenizer`."""
        return str(self._processor.id_to_piece(token))

    def split(self, surface: bytes) -> list[int]:
        """See `Tokenizer`."""
        try:
            surface.decode("utf-8")
        except UnicodeDecodeError:
            return [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in surface]
        return list(self._inner.encode(surface))

    def normalized(self, piece: str) -> str:
        """`piece` as the model's normalization leaves it, without the space that many put before a text."""
        text = piece.replace(SPACE_MARK, " ")
        return str(self._inner.normalize(text)).replace(" ", SPACE_MARK)

    @cached_property
    def _words(self) -> WordCache:
        return WordCache(self._processor, self.proto, self._inner)

    @cached_property
    def proto(self) -> sentencepiece_model_pb2.ModelProto:
        """All that the file says."""
        return sentencepiece_model_pb2.ModelProto.FromString(self._processor.serialized_model_proto())

    @cached_property
    def _user_ids(self) -> frozenset[int]:
        defined = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
        return frozenset(i for i, piece in enumerate(self.proto.pieces) if piece.type == defined)

    @cached_property
    def _inner(self) -> sentencepiece.SentencePieceProcessor:
        """The same model without the space that many put before a text."""
        proto = sentencepiece_model_pb2.ModelProto()
        proto.CopyFrom(self.proto)
        proto.normalizer_spec.add_dummy_prefix = False
        proto.normalizer_spec.remove_extra_whitespaces = False
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(proto.SerializeToString())
        return processor


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`; the files beside it name the end token, else its usual name does."""

    def __init__(self, path: Path) -> None:
        content = read_tokenizer_file(path)
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
            raise no_end_token(path, "put a tokenizer_config.json with its eos_token beside it")
        self.eod_id = end
        self.bos_id = _special_token(path, "bos_token", vocabulary, _USUAL_BEGIN_TOKENS)
        self.begins_texts = self._is_begin_asked()
        self._added = self._tokenizer.get_added_tokens_decoder()
        self._is_byte_level = '"ByteLevel"' in self._tokenizer.to_str().split('"model"')[0]

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        text.encode("utf-8")
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`."""
        for text in texts:
            text.encode("utf-8")
        # "fast": without the offsets of tokens in the text.
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [list(encoding.ids) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return str(self._tokenizer.decode(self._check_ids(ids), skip_special_tokens=True))

    def kind(self, token: int) -> PieceKind:
        """See `Tokenizer`."""
        if token in self._added:
            return PieceKind.special if self._added[token].special else PieceKind.user
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return PieceKind.unused
        is_byte = len(piece) == 1 if self._is_byte_level else _BYTE_PIECE.fullmatch(piece)
        return PieceKind.byte if is_byte else PieceKind.normal

    def surface(self, token: int) -> bytes:
        """See `Tokenizer`."""
        kind, piece = self.kind(token), self.label(token)
        if kind in (PieceKind.special, PieceKind.unused):
            return b""
        if kind is PieceKind.user:
            return piece.encode()
        if self._is_byte_level:
            return bytes(_BYTE_OF_LETTER[letter] for letter in piece)
        if kind is PieceKind.byte:
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(SPACE_MARK, " ").encode()

    def label(self, token: int) -> str:
        """See `Tokenizer`."""
        return self._tokenizer.id_to_token(token) or ""

    def split(self, surface: bytes) -> list[int]:
        """See `Tokenizer`."""
        try:
            text = surface.decode("utf-8")
        except UnicodeDecodeError:
            names = (LETTER_OF_BYTE[b] if self._is_byte_level else f"<0x{b:02X}>" for b in surface)
            found = (self._tokenizer.token_to_id(name) for name in names)
            return [token for token in found if token is not None]
        # What a file may put before a text stands before the mark, and the mark merges with little.
        for mark in ("\n", "\u2029", "|"):
            before = self.encode(mark)
            ids = self.encode(mark + text)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return self.encode(text)

    def _is_begin_asked(self) -> bool:
        # As transformers 5.23: a post-processor decides, and add_bos_token only where there is none.
        if self._tokenizer.post_processor is None:
            return is_begin_asked_beside(self.path)
        plain, dressed = (
            self._tokenizer.encode("a", add_special_tokens=is_on).ids for is_on in (False, True)
        )
        return dressed != plain and dressed[:1] == [self.bos_id]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at `path`: a sentencepiece `.model`, a `tokenizer.json`, a tiktoken rank file, or their folder.

    In a folder with several, the one that `find_tokenizer` names is taken.

    Raises:
        UserError: missing, damaged, of unknown kind, or without an end-of-text token.
    """
    place = locate_tokenizer(path)
    if place.suffix == ".json":
        return HuggingFaceTokenizer(place)
    if place.suffix == ".tiktoken" or ".model" in place.suffixes:
        # LLaMA 3 calls its rank file tokenizer.model, as LLaMA 2 its sentencepiece model.
        is_ranks = is_rank_file(read_tokenizer_file(place))
        return RankTokenizer(place) if is_ranks else SentencePieceTokenizer(place)
    raise UserError(
        f"tokenizer {place} is of unknown kind ({place.suffix!r}): give a .model, .json or .tiktoken file"
    )


def _letters_of_bytes() -> dict[int, str]:
    """The letter for each byte in byte-level pieces: itself where it can be seen, else one from U+0100 on (GPT-2)."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


LETTER_OF_BYTE = _letters_of_bytes()
_BYTE_OF_LETTER = {letter: byte for byte, letter in LETTER_OF_BYTE.items()}
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def _special_token(path: Path, key: str, vocabulary: dict[str, int], usual: Sequence[str]) -> int | None:
    """Id of the special token `key`: as the side files say, else the first of `usual` that exists."""
    for side, named in said_beside(path, key):
        if isinstance(named, dict):
            named = named.get("content")
        if isinstance(named, str):
            if named not in vocabulary:
                raise UserError(f"{side}: {key} ({named!r}) is not in the vocabulary of {path.name}: mend it")
            return vocabulary[named]
    return next((vocabulary[token] for token in usual if token in vocabulary), None)
