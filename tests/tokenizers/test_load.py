"""Tokenizers of both kinds: round trips, special tokens, errors."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tokenizers
from megallama.host.errors import UserError
from megallama.tokenizers import load as tokenizer_module
from megallama.tokenizers.interface import PieceKind
from megallama.tokenizers.load import Tokenizer, load_tokenizer
from tests.support.corpus import CHINESE, make_text

TRICKY = [
    "",
    " ",
    "  leading and trailing  ",
    "\n\n\t\tif x:\n\t    return  'a'\r\n \n",
    CHINESE,
    "　全角空格，与 mixed 中英文 12345 𠮷 😀 \u200b零宽",
    "<s></s><unk><0x0A>",
    "nul\0byte \x7f \x1b[0m",
    "é decomposed, ﬁ ligature, ① ½ Ａ",
    inspect.getsource(tokenizer_module),
]


def save_hugging_face(path: Path, *, end: str | None = "<|endoftext|>") -> Path:
    """A byte-level BPE tokenizer.json."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|begin|>"] + ([end] if end else [])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([make_text(n) for n in range(5)], trainer)
    made.save(str(path))
    return path


@pytest.fixture(scope="module", params=["sentencepiece", "huggingface"])
def any_tokenizer(
    request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    if request.param == "sentencepiece":
        return tokenizer
    return load_tokenizer(save_hugging_face(tmp_path_factory.mktemp("hf") / "tokenizer.json"))


@pytest.mark.parametrize("text", TRICKY)
def test_text_survives_the_round_trip(any_tokenizer: Tokenizer, text: str) -> None:
    ids = any_tokenizer.encode(text)
    assert any_tokenizer.decode(ids) == text
    assert all(0 <= i < any_tokenizer.vocab_size for i in ids)
    assert not {any_tokenizer.eod_id, any_tokenizer.bos_id} & set(ids)


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_any_unicode_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_texts_can_be_encoded_one_by_one_and_joined(any_tokenizer: Tokenizer) -> None:
    # A prefix space, as sentencepiece adds by default, would stand between the parts.
    parts = ["def f", "(x):\n", "    return", " 中文", "模型"]
    ids = [i for part in parts for i in any_tokenizer.encode(part)]
    assert any_tokenizer.decode(ids) == "".join(parts)


def test_batches_equal_single_texts(any_tokenizer: Tokenizer) -> None:
    assert any_tokenizer.encode_batch(TRICKY) == [any_tokenizer.encode(text) for text in TRICKY]


def test_special_tokens_are_neither_read_from_text_nor_shown(any_tokenizer: Tokenizer) -> None:
    assert any_tokenizer.eod_id not in any_tokenizer.encode("a<|endoftext|>b</s>c")
    assert any_tokenizer.decode([any_tokenizer.eod_id, *any_tokenizer.encode("中文")]) == "中文"


@pytest.mark.parametrize("text", TRICKY)
def test_tokens_stand_for_the_bytes_of_the_text(any_tokenizer: Tokenizer, text: str) -> None:
    ids = any_tokenizer.encode(text)
    assert b"".join(any_tokenizer.surface(i) for i in ids) == text.encode()
    assert b"".join(any_tokenizer.surface(i) for i in any_tokenizer.split(text.encode())) == text.encode()


def test_each_token_has_a_kind_and_splits_into_its_own_bytes(any_tokenizer: Tokenizer) -> None:
    kinds = [any_tokenizer.kind(token) for token in range(any_tokenizer.vocab_size)]
    assert kinds.count(PieceKind.byte) == 256 and PieceKind.normal in kinds
    for token, kind in enumerate(kinds):
        surface = any_tokenizer.surface(token)
        assert bool(surface) is (kind is not PieceKind.special)
        assert b"".join(any_tokenizer.surface(i) for i in any_tokenizer.split(surface)) == surface
    assert any_tokenizer.kind(any_tokenizer.eod_id) is PieceKind.special
    assert len(any_tokenizer.split("中".encode()[:2])) == 2


def save_llama_like(path: Path) -> Path:
    """A tokenizer.json as LLaMA 2's: a space mark before the text, bytes for what is unknown."""
    vocabulary = {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        "\u2581": 3,
        "中": 4,
        "国": 5,
        "\u2581中": 6,
        "a": 7,
        "\u2581a": 8,
    }
    vocabulary |= {f"<0x{byte:02X}>": 9 + byte for byte in range(256)}
    merges = [("\u2581", "中"), ("\u2581", "a")]
    model = tokenizers.models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(path))
    return path


def test_the_space_before_a_text_is_no_part_of_a_word_inside_it(tmp_path: Path) -> None:
    loaded = load_tokenizer(save_llama_like(tmp_path / "tokenizer.json"))
    assert loaded.encode("中国") == [6, 5]
    assert loaded.split("中国".encode()) == [4, 5]
    assert loaded.split(" 中".encode()) == [6]
    assert loaded.split("好".encode()) == [9 + byte for byte in "好".encode()]
    assert loaded.surface(6) == " 中".encode() and loaded.surface(9 + 0xE4) == b"\xe4"


def test_ids_outside_the_vocabulary_are_refused(any_tokenizer: Tokenizer) -> None:
    with pytest.raises(IndexError):
        any_tokenizer.decode([any_tokenizer.vocab_size])
    with pytest.raises(IndexError):
        any_tokenizer.decode([-1])


def test_half_a_surrogate_pair_is_refused(any_tokenizer: Tokenizer) -> None:
    with pytest.raises(UnicodeEncodeError):
        any_tokenizer.encode("a\ud800")


def test_facts_of_a_sentencepiece_file(tokenizer: Tokenizer, tokenizer_path: Path) -> None:
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eod_id) == (500, 1, 2)
    assert tokenizer.name == "sentencepiece-500"
    assert tokenizer.sha256 == hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()
    assert load_tokenizer(tokenizer_path.parent).sha256 == tokenizer.sha256


def test_hugging_face_end_token_comes_from_the_side_file(tmp_path: Path) -> None:
    path = save_hugging_face(tmp_path / "tokenizer.json", end="<|完|>")
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(path)
    side = tmp_path / "tokenizer_config.json"
    settings = {"eos_token": {"content": "<|完|>"}, "bos_token": "<|begin|>"}
    side.write_text(json.dumps(settings), encoding="utf-8")
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_id, loaded.eod_id) == (0, 1)
    side.write_text('{"eos_token": "<missing>"}', encoding="utf-8")
    with pytest.raises(UserError, match="<missing>.*not in the vocabulary"):
        load_tokenizer(path)


def test_truncation_and_added_tokens_of_the_file_are_ignored(tmp_path: Path) -> None:
    path = save_hugging_face(tmp_path / "tokenizer.json")
    plain = load_tokenizer(path)
    made = tokenizers.Tokenizer.from_file(str(path))
    made.enable_truncation(4)
    made.enable_padding(length=4)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    made.save(str(path))
    assert load_tokenizer(path).encode(CHINESE) == plain.encode(CHINESE)
    assert load_tokenizer(path).encode("a") == plain.encode("a")


def _without_end(path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([make_text(1).replace("\n", " ")]),
        model_prefix=str(path.with_suffix("")),
        vocab_size=100,
        hard_vocab_limit=False,
        eos_id=-1,
        minloglevel=2,
    )


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("missing.model", lambda path: None, "does not exist"),
        (
            "damaged.model",
            lambda path: path.write_bytes(b"\x0a\xff garbage" * 9),
            "not a readable sentencepiece",
        ),
        ("empty.model", lambda path: path.write_bytes(b""), "not a readable sentencepiece"),
        ("damaged.json", lambda path: path.write_text("{"), "not a readable tokenizer.json"),
        ("other.json", lambda path: path.write_text("{}"), "not a readable tokenizer.json"),
        ("words.vocab", lambda path: path.write_text("x"), "unknown kind"),
        ("folder", lambda path: path.mkdir(), "holds neither"),
        ("folder.model", lambda path: path.mkdir(), "holds neither"),
        ("noend.model", _without_end, "no end-of-text token"),
    ],
)
def test_bad_files_give_one_clear_message(
    tmp_path: Path, name: str, make: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / name
    make(path)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(path)
    assert name in str(caught.value)


def test_a_truncated_model_is_refused(tokenizer_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    content = tokenizer_path.read_bytes()
    path.write_bytes(content[: len(content) // 2 + 1])
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(path)
