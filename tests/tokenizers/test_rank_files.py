"""tiktoken's rank files: LLaMA 3 and Qwen as published, other families by a side file, damage."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.host.errors import UserError
from megallama.tokenizers import rank_files
from megallama.tokenizers.interface import PieceKind
from megallama.tokenizers.load import Tokenizer, load_tokenizer
from megallama.tokenizers.rank_files import LONG_RUN
from tests.support.materials import LLAMA3, QWEN, QWEN35, chinese_chapters
from tests.tokenizers.test_load import TRICKY

PATTERN = r"\p{L}+|\p{N}|[^\p{L}\p{N}]+"


@pytest.fixture(scope="module")
def llama3() -> Tokenizer:
    return load_tokenizer(LLAMA3)


@pytest.fixture(scope="module")
def qwen() -> Tokenizer:
    return load_tokenizer(QWEN)


def write_ranks(path: Path, tokens: list[bytes]) -> Path:
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    path.write_text("".join(lines), encoding="ascii")
    return path


def small(path: Path) -> Path:
    """All bytes, two Chinese characters, and one word of both."""
    text = ["中", "国", "中国"]
    parts = [text[0].encode()[:2], text[0].encode(), text[1].encode()[:2], text[1].encode(), text[2].encode()]
    return write_ranks(path, [bytes([byte]) for byte in range(256)] + parts)


def describe(path: Path, **changes: object) -> None:
    facts = {"pattern": PATTERN, "special_tokens": {"<|完|>": 300}, "eos_token": "<|完|>", **changes}
    path.with_name("tiktoken.json").write_text(json.dumps(facts), encoding="utf-8")


def test_llama3_is_as_published(llama3: Tokenizer) -> None:
    # Ids of Meta's own tokenizer (meta-llama/llama3, test_tokenizer.py): the one independent known answer.
    text = "This is a test sentence."
    assert llama3.encode(text) == [2028, 374, 264, 1296, 11914, 13]
    assert (llama3.vocab_size, llama3.bos_id, llama3.eod_id) == (128256, 128000, 128001)
    assert [llama3.label(i) for i in (128006, 128007, 128009, 128255)] == [
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|reserved_special_token_245|>",
    ]
    assert llama3.name == "tiktoken-128256"


@pytest.mark.parametrize(
    ("path", "size", "end", "last"),
    [(QWEN, 151851, 151643, "<|extra_204|>"), (QWEN35, 248077, 248044, "<|audio_pad|>")],
)
def test_qwen_is_as_published(path: Path, size: int, end: int, last: str) -> None:
    loaded = load_tokenizer(path)
    assert (loaded.vocab_size, loaded.eod_id, loaded.bos_id) == (size, end, None)
    assert (loaded.label(end), loaded.label(size - 1)) == ("<|endoftext|>", last)
    assert loaded.decode(loaded.encode("国破山河在")) == "国破山河在"
    # Every digit is a token of its own; LLaMA 3 takes up to three.
    assert [loaded.decode([i]) for i in loaded.encode("2024")] == list("2024")


@pytest.mark.parametrize("text", TRICKY)
def test_text_survives_the_round_trip(llama3: Tokenizer, qwen: Tokenizer, text: str) -> None:
    assert llama3.decode(llama3.encode(text)) == text
    # Qwen composes characters first (NFC).
    assert qwen.decode(qwen.encode(text)) == unicodedata.normalize("NFC", text)
    assert qwen.encode_batch([text, text]) == [qwen.encode(text)] * 2


@settings(deadline=None)
@given(text=st.text())
def test_any_unicode_survives_the_round_trip(llama3: Tokenizer, text: str) -> None:
    assert llama3.decode(llama3.encode(text)) == text


def test_every_line_of_a_chinese_novel_survives(llama3: Tokenizer, qwen: Tokenizer) -> None:
    for line in "\n".join(chinese_chapters()[:20]).splitlines():
        assert llama3.decode(llama3.encode(line)) == line
        assert qwen.decode(qwen.encode(line)) == line


@pytest.mark.parametrize("piece", ["中", "a", "\n", "中，"])
def test_long_runs_are_no_trouble(llama3: Tokenizer, piece: str) -> None:
    text = piece * (300_000 // len(piece))
    assert llama3.decode(llama3.encode(text)) == text


def test_a_million_spaces_are_no_trouble(llama3: Tokenizer) -> None:
    text = "。\n" + " " * 1_000_000 + "完"
    assert llama3.decode(llama3.encode(text)) == text


spaces = st.sampled_from([" ", "  ", "    ", "\n", "\r\n", "\t", "\u3000", "\xa0", "\x1c", "\x85", "\u2028"])
others = st.sampled_from(["a", "中", "1", ".", "。", "'s", "\u0301", "😀", "_", "\u0e34", "²", "Ⅷ"])


@pytest.mark.parametrize("path", [LLAMA3, QWEN, QWEN35])
def test_runs_are_cut_where_the_pattern_cuts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_tokenizer(path)

    @settings(deadline=None, max_examples=150)
    @given(parts=st.lists(st.one_of(spaces, spaces, spaces, others), max_size=20))
    def check(parts: list[str]) -> None:
        text = "".join(parts)
        whole = loaded.encode(text)
        with monkeypatch.context() as patch:
            patch.setattr(rank_files, "LONG_RUN", re.compile(LONG_RUN.pattern.replace("16384", "3")))
            assert loaded.encode(text) == whole

    check()


def test_special_tokens_are_neither_read_from_text_nor_shown(llama3: Tokenizer) -> None:
    ids = llama3.encode("a<|end_of_text|>b")
    assert llama3.eod_id not in ids
    assert llama3.decode([llama3.bos_id or 0, *ids, llama3.eod_id]) == "a<|end_of_text|>b"
    assert llama3.kind(llama3.eod_id) is PieceKind.special and llama3.surface(llama3.eod_id) == b""
    with pytest.raises(IndexError):
        llama3.decode([llama3.vocab_size])
    with pytest.raises(UnicodeEncodeError):
        llama3.encode("a\ud800")


def test_each_token_is_what_its_bytes_split_into(llama3: Tokenizer) -> None:
    for token in range(0, 128_000, 97):
        assert llama3.split(llama3.surface(token)) == [token]
    assert llama3.split(b"\xe4\xb8") == [160, 116] or len(llama3.split(b"\xe4\xb8")) == 1


def test_another_family_is_read_with_its_side_file(tmp_path: Path) -> None:
    path = small(tmp_path / "mine.tiktoken")
    with pytest.raises(UserError, match=r"no known family \(261 ranks\).*tiktoken.json"):
        load_tokenizer(path)
    describe(path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.vocab_size, loaded.eod_id, loaded.bos_id) == (301, 300, None)
    assert loaded.encode("中国1国") == [260, ord("1"), 259]
    # Ids between the ranks and the special token are no tokens.
    assert loaded.kind(280) is PieceKind.unused and loaded.decode([260, 280, 300]) == "中国"
    before = loaded.sha256
    describe(path, pattern=r"\p{L}+|.")
    assert load_tokenizer(path).sha256 != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "("}, "cannot be used"),
        ({"eos_token": "<|没有|>"}, "not among special_tokens"),
        ({"special_tokens": {"<|完|>": 7}}, "id of another token"),
        ({"special_tokens": [1]}, "cannot be understood"),
        ({"normalization": "nfc"}, "normalization"),
    ],
)
def test_a_wrong_side_file_says_what_to_change(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = small(tmp_path / "mine.tiktoken")
    describe(path, **changes)
    with pytest.raises(UserError, match=message):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"IQ== 0\nIg== 1\n", "254 single bytes are missing"),
        (b"IQ== 0\nnonsense\n", "line 2 is no base64 token"),
        (b"IQ== 0\n*** 1\n", "line 2 is no base64 token"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(path)


def test_checksum_is_of_the_file(llama3: Tokenizer) -> None:
    assert llama3.sha256 == hashlib.sha256(LLAMA3.read_bytes()).hexdigest()
