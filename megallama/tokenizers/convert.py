"""A `tokenizer.json` that cuts texts as a tiktoken rank file or a sentencepiece model does.

tiktoken and sentencepiece join, again and again, the two neighbours whose union is the earliest token, and of equal
ones the leftmost. A `tokenizer.json` lists pairs instead. One pair a token is enough: the parts of a token in a text
are joined in the same order as when the token stands alone, since nothing outside of it has joined with a part of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from sentencepiece import sentencepiece_model_pb2

import tokenizers
from megallama.tokenizers.interface import SPACE_MARK, PieceKind, Tokenizer
from megallama.tokenizers.load import LETTER_OF_BYTE, SentencePieceTokenizer
from megallama.tokenizers.rank_files import RankTokenizer
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

Text = TypeVar("Text", str, bytes)

_NORMALIZERS = {
    "NFC": normalizers.NFC,
    "NFD": normalizers.NFD,
    "NFKC": normalizers.NFKC,
    "NFKD": normalizers.NFKD,
}


def tokenizer_json(tokenizer: Tokenizer, *, begin_id: int | None = None) -> tokenizers.Tokenizer:
    """The same tokenizer in Hugging Face's form, with `begin_id` before each text where special tokens are asked for.

    Special tokens keep their ids. Their names are read out of texts there, unless it is told not to.
    """
    if isinstance(tokenizer, RankTokenizer):
        made = _from_ranks(tokenizer)
    else:
        assert isinstance(tokenizer, SentencePieceTokenizer), tokenizer.name
        made = _from_sentencepiece(tokenizer)
    made.add_special_tokens(
        [AddedToken(label, normalized=False, special=True) for label in tokenizer.special_tokens()]
    )
    if begin_id is not None:
        made.post_processor = _begin_template(tokenizer.label(begin_id), begin_id)
    return made


def with_begin(path: Path, tokenizer: Tokenizer, begin_id: int | None) -> tokenizers.Tokenizer:
    """The `tokenizer.json` at `path` with `begin_id` before each text and nothing else around it; None: nothing at all.

    What it does to the places of tokens in a text (ByteLevel) is kept.
    """
    made = tokenizers.Tokenizer.from_file(str(path))
    content: Any = json.loads(made.to_str())
    there = content["post_processor"] or {"type": "Sequence", "processors": []}
    parts = there["processors"] if there["type"] == "Sequence" else [there]
    parts = [part for part in parts if part["type"] == "ByteLevel"]
    if begin_id is not None:
        made.post_processor = _begin_template(tokenizer.label(begin_id), begin_id)
        parts.append(json.loads(made.to_str())["post_processor"])
    content["post_processor"] = {"type": "Sequence", "processors": parts} if parts else None
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def _begin_template(begin: str, begin_id: int) -> processors.TemplateProcessing:
    # As lists: a name may hold spaces or colons.
    return processors.TemplateProcessing(
        single=[begin, "$A"], pair=[begin, "$A", begin, "$B"], special_tokens=[(begin, begin_id)]
    )


def _from_ranks(tokenizer: RankTokenizer) -> tokenizers.Tokenizer:
    ranks, family = tokenizer.ranks, tokenizer.family

    def letters(token: bytes) -> str:
        return "".join(LETTER_OF_BYTE[byte] for byte in token)

    merges = _list_merges(sorted(ranks, key=lambda token: ranks[token]), ranks.get)
    vocabulary = {letters(token): rank for token, rank in ranks.items()}
    # In the vocabulary, because ids that are added follow it without gaps.
    vocabulary |= family.special_tokens
    pairs = [(letters(one), letters(other)) for one, other in merges]
    # tiktoken takes a piece of the text that is a token as it is, whatever its merges would make of it.
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=True))
    if family.normalization is not None:
        made.normalizer = _NORMALIZERS[family.normalization]()
    split = pre_tokenizers.Split(Regex(family.pattern), behavior="isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    return made


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    trainer, spec = tokenizer.proto.trainer_spec, tokenizer.proto.normalizer_spec
    is_bpe = trainer.model_type == sentencepiece_model_pb2.TrainerSpec.BPE
    made = tokenizers.Tokenizer(_bpe(tokenizer) if is_bpe else _unigram(tokenizer))
    users = [token for token in range(tokenizer.vocab_size) if tokenizer.kind(token) is PieceKind.user]
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", SPACE_MARK))
    made.normalizer = normalizers.Sequence(steps)
    if spec.add_dummy_prefix:
        # A normalizer would put one after every special token, too. The first step puts a space before the text, the
        # second makes it a mark: with a mark at once, a text that begins with a space would get none.
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False),
                pre_tokenizers.Metaspace(replacement=SPACE_MARK, prepend_scheme="never", split=False),
            ]
        )
    ending = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *ending]
    )
    made.add_tokens(
        [AddedToken(_text_of(tokenizer, token), normalized=False, special=False) for token in users]
    )
    return made


def _text_of(tokenizer: SentencePieceTokenizer, token: int) -> str:
    """The key of a token: user-defined ones are looked for in the text itself, where spaces are spaces."""
    label = tokenizer.label(token)
    return label.replace(SPACE_MARK, " ") if tokenizer.kind(token) is PieceKind.user else label


def _bpe(tokenizer: SentencePieceTokenizer) -> models.BPE:
    trainer = tokenizer.proto.trainer_spec
    scores = {
        tokenizer.label(token): -float(tokenizer.proto.pieces[token].score)
        for token in range(tokenizer.vocab_size)
        if tokenizer.kind(token) is PieceKind.normal
    }
    # Of pieces with one score the leftmost pair is joined first: a run of one character grows from the left, as here,
    # where a longer piece comes first.
    pieces = sorted(scores, key=lambda piece: (scores[piece], -len(piece)))
    vocabulary = {_text_of(tokenizer, token): token for token in range(tokenizer.vocab_size)}
    # sentencepiece also joins a character that is no piece; a tokenizer.json has no words for it.
    merges = [
        pair for pair in _list_merges(pieces, scores.get) if pair[0] in vocabulary and pair[1] in vocabulary
    ]
    return models.BPE(
        vocab=vocabulary,
        merges=merges,
        unk_token=tokenizer.label(trainer.unk_id),
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )


def _unigram(tokenizer: SentencePieceTokenizer) -> models.Unigram:
    trainer = tokenizer.proto.trainer_spec
    pieces = [
        (_text_of(tokenizer, token), float(tokenizer.proto.pieces[token].score))
        for token in range(tokenizer.vocab_size)
    ]
    return models.Unigram(vocab=pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)


def _list_merges(tokens: Iterable[Text], order: Callable[[Text], float | None]) -> list[tuple[Text, Text]]:
    """The last pair of each of `tokens`, in their order; nothing for one that no merges reach.

    Args:
        tokens: Those that are merged, the earliest first.
        order: The smaller, the earlier a token is made; None for what is no token.
    """
    pairs = (_last_pair(token, order) for token in tokens if len(token) > 1)
    return [pair for pair in pairs if pair is not None]


def _last_pair(token: Text, order: Callable[[Text], float | None]) -> tuple[Text, Text] | None:
    parts = [token[i : i + 1] for i in range(len(token))]
    orders = [order(one + other) for one, other in zip(parts, parts[1:], strict=False)]
    while len(parts) > 2:
        at, best = -1, float("inf")
        for place, found in enumerate(orders):
            if found is not None and found < best:
                at, best = place, found
        if at < 0:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del orders[at]
        if at > 0:
            orders[at - 1] = order(parts[at - 1] + parts[at])
        if at < len(orders):
            orders[at] = order(parts[at] + parts[at + 1])
    return (parts[0], parts[1])
