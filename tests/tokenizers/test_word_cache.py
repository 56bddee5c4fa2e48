"""Encoding by parts gives the ids of the whole text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from megallama.tokenizers import word_cache
from megallama.tokenizers.load import SentencePieceTokenizer
from megallama.tokenizers.word_cache import WordCache
from tests.support.corpus import make_text

SpecChange = Callable[[sentencepiece_model_pb2.ModelProto], None]


def processor_of(proto: sentencepiece_model_pb2.ModelProto) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto.SerializeToString())
    return processor


def changed(path: Path, change: SpecChange) -> tuple[sentencepiece.SentencePieceProcessor, WordCache]:
    proto = SentencePieceTokenizer(path).proto
    change(proto)
    whole = processor_of(proto)
    without = sentencepiece_model_pb2.ModelProto()
    without.CopyFrom(proto)
    without.normalizer_spec.add_dummy_prefix = False
    return whole, WordCache(whole, proto, processor_of(without))


def plain(proto: sentencepiece_model_pb2.ModelProto) -> None:
    assert not proto.normalizer_spec.add_dummy_prefix


def with_dummy_prefix(proto: sentencepiece_model_pb2.ModelProto) -> None:
    proto.normalizer_spec.add_dummy_prefix = True


def with_user_pieces(proto: sentencepiece_model_pb2.ModelProto) -> None:
    for piece in ("<|im_start|>", "▁▁▁x", "。\n", "ab，"):
        proto.pieces.add(
            piece=piece, score=0, type=sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
        )


@pytest.fixture(scope="module", params=[plain, with_dummy_prefix, with_user_pieces])
def pair(
    request: pytest.FixtureRequest, tokenizer_path: Path
) -> tuple[sentencepiece.SentencePieceProcessor, WordCache]:
    return changed(tokenizer_path, request.param)


fragment = st.one_of(
    st.sampled_from(
        [
            " ",
            "  ",
            "   x",
            "\n",
            "\n\n",
            "\t",
            "▁",
            "▁x",
            "the",
            " token",
            "model",
            "语言模型",
            "，",
            "。\n",
            "def step_",
        ]
    ),
    st.sampled_from(["<|im_start|>", "ab，", "\u3000", "\0", "0.5", "((", "𠮷", "é", "e\u0301", "\r\n"]),
    st.text(st.characters(blacklist_categories=["Cs"]), max_size=4),
)


@settings(max_examples=300, deadline=None)
@given(fragments=st.lists(fragment, max_size=25))
def test_any_text(pair: tuple[sentencepiece.SentencePieceProcessor, WordCache], fragments: list[str]) -> None:
    whole, words = pair
    # Many spaces, so that it is cut; and as it is.
    for text in (" ".join(fragments), "".join(fragments), " ".join("".join(fragments))):
        assert words.encode_batch([text]) == [whole.encode(text)]


def test_real_text_comes_from_the_cache(
    pair: tuple[sentencepiece.SentencePieceProcessor, WordCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, words = pair
    texts = [make_text(number) for number in range(40)]
    assert words.encode_batch(texts) == whole.encode(texts)
    monkeypatch.setattr(words, "_inner", None)
    short = [" ".join(["the model reads"] * 5)]
    assert words.encode_batch(short) == whole.encode(short), "known parts need no model"


def test_the_cache_is_bounded(tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, words = changed(tokenizer_path, plain)
    monkeypatch.setattr(word_cache, "_MAX_PARTS", 10)
    texts = [make_text(number) for number in range(10)]
    assert words.encode_batch(texts) == whole.encode(texts)
    assert len(words._ids) <= 10


def as_unigram(proto: sentencepiece_model_pb2.ModelProto) -> None:
    proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM


def with_a_piece_over_a_space(proto: sentencepiece_model_pb2.ModelProto) -> None:
    proto.pieces.add(piece="▁reads▁a", score=0)


def with_extra_spaces_removed(proto: sentencepiece_model_pb2.ModelProto) -> None:
    proto.normalizer_spec.remove_extra_whitespaces = True


@pytest.mark.parametrize("change", [as_unigram, with_a_piece_over_a_space, with_extra_spaces_removed])
def test_models_whose_texts_cannot_be_cut_stay_whole(tokenizer_path: Path, change: SpecChange) -> None:
    whole, words = changed(tokenizer_path, change)
    assert words._parts is None
    texts = [make_text(3), "the model  reads a token "]
    assert words.encode_batch(texts) == whole.encode(texts)
