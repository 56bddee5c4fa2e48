"""Scripts and languages by the letters of a text."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from megallama.corpus.script import count_scripts, language_of, script_of

# First word of the Unicode name of letters -> our script.
NAMES = {
    "LATIN": "latin",
    "FULLWIDTH": "latin",
    "CYRILLIC": "cyrillic",
    "CJK": "han",
    "HANGUL": "hangul",
    "HIRAGANA": "kana",
    "KATAKANA": "kana",
    "ARABIC": "arabic",
    "THAI": "thai",
    "DEVANAGARI": "devanagari",
    "BOPOMOFO": "bopomofo",
}


def test_scripts_agree_with_the_names_of_unicode() -> None:
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if not unicodedata.category(character).startswith("L"):
            continue
        word = unicodedata.name(character, "").split(" ")[0].split("-")[0]
        found = script_of(character)
        if found != "none" and word in NAMES:
            assert found == NAMES[word], (hex(code), unicodedata.name(character))


@pytest.mark.parametrize("character", ["0", "，", "。", " ", "\n", "😀", "_", "\x00", "\U0010ffff"])
def test_what_is_no_letter_has_no_script(character: str) -> None:
    assert script_of(character) == "none"


@pytest.mark.parametrize("character", ["一", "龥", "〇", "々", "𠮷", "㐀", "豈", "\U000323af"])
def test_rare_chinese_characters_are_han(character: str) -> None:
    assert script_of(character) == "han"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("训练需要高质量的语料，尤其是中文。", "chinese"),
        ("用 PyTorch 训练一个 LLaMA 模型", "chinese"),
        ("東京都は日本の首都です。", "japanese"),
        ("한국어 문장입니다 漢字", "korean"),
        ("The model 模型 learns from a lot of text.", "latin"),
        ("русский текст", "cyrillic"),
        ("12345 !?", "none"),
        ("", "none"),
    ],
)
def test_language_follows_the_letters(text: str, language: str) -> None:
    assert language_of(text) == language


def test_counts_are_of_characters() -> None:
    assert count_scripts("中文ab1中") == {"han": 3, "latin": 2, "none": 1}
