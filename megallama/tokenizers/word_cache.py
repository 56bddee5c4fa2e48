"""A cache that speeds up sentencepiece BPE: parts of a text that were tokenized before are looked up.

A text is split where no piece of the vocabulary reaches across, so the ids are exactly those of the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megallama.tokenizers.interface import SPACE_MARK

_MAX_PARTS = 1 << 18
_MAX_PART_CHARACTERS = 32
_CHARACTERS_A_SPACE = 16
"""Texts with fewer spaces, as Chinese, hold few parts twice; looking would cost more than it saves."""


class WordCache:
    """Encodes texts with a sentencepiece model through a bounded memory of their parts.

    BPE joins neighbours only into what is a piece. So between two characters that stand side by side in
    no piece, a text can be cut and its parts merged on their own; and before a run of spaces, where no
    piece holds a space behind anything else. Both are read off the model's pieces. Models for which
    this is not so certain (Unigram, whose sums round; normalization; no byte fallback) are not cut.
    """

    def __init__(
        self,
        processor: sentencepiece.SentencePieceProcessor,
        proto: sentencepiece_model_pb2.ModelProto,
        inner: sentencepiece.SentencePieceProcessor,
    ) -> None:
        """`inner` is the same model without the space that `processor` may put before a text."""
        self._processor = processor
        self._inner = inner
        self._start = " " if proto.normalizer_spec.add_dummy_prefix else ""
        self._parts = _part_pattern(proto)
        self._ids: dict[str, list[int]] = {}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[int]:
        content = text.encode("utf-8")  # raises for half a surrogate pair
        has_words = text.count(" ") * _CHARACTERS_A_SPACE > len(text)
        if self._parts is None or not has_words or SPACE_MARK in text:
            return list(self._processor.encode(content))
        known, ids = self._ids, list[int]()
        for part in self._parts.findall(self._start + text):
            found = known.get(part)
            if found is None:
                found = self._inner.encode(part)
                if len(part) <= _MAX_PART_CHARACTERS:
                    if len(known) >= _MAX_PARTS:
                        known.clear()
                    known[part] = found
            ids += found
        return ids


def _part_pattern(proto: sentencepiece_model_pb2.ModelProto) -> re.Pattern[str] | None:
    """What matches the parts of a text one after another; None where a model's texts must stay whole."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if (
        trainer.model_type != trainer.BPE
        or trainer.treat_whitespace_as_suffix
        or not trainer.byte_fallback
        or normalizer.precompiled_charsmap
        or normalizer.remove_extra_whitespaces
        or not normalizer.escape_whitespaces
    ):
        return None
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    pieces = [p.piece for p in proto.pieces if p.type in (kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED)]
    words = [piece.lstrip(SPACE_MARK) for piece in pieces]
    if any(SPACE_MARK in word or " " in word for word in words):
        return None
    groups = _neighbours(words)
    classes = ["".join(map(re.escape, sorted(group))) for group in groups]
    alternatives = [f"[{letters}]+" for letters in classes]
    alternatives.append(f"[^ {''.join(classes)}]+")
    return re.compile(f" *(?:{'|'.join(alternatives)})| +")


def _neighbours(words: Sequence[str]) -> list[set[str]]:
    """Characters in groups, the largest first: whatever stands side by side in a word is of one group."""
    group_of: dict[str, set[str]] = {}
    for word in words:
        if len(word) < 2:
            continue
        joined = group_of.get(word[0], {word[0]})
        for character in word:
            other = group_of.get(character, {character})
            if other is not joined:
                small, joined = sorted((joined, other), key=len)
                joined |= small
                for member in small:
                    group_of[member] = joined
            group_of[character] = joined
    groups = {id(group): group for group in group_of.values()}
    return sorted(groups.values(), key=lambda group: (-len(group), min(group)))
