"""The writing system of a character, and the likely language of a text judged by its letters.

By script, not by vocabulary: it tells Chinese, Japanese, Korean, Russian, Arabic ... apart at the speed of a lookup,
and calls everything in Latin letters `latin`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping

_RANGES = (
    # first, last, script: blocks of Unicode 16 with letters; what lies between belongs to no script.
    (0x0041, 0x005A, "latin"),
    (0x0061, 0x007A, "latin"),
    (0x00AA, 0x00AA, "latin"),
    (0x00BA, 0x00BA, "latin"),
    (0x00C0, 0x00D6, "latin"),
    (0x00D8, 0x00F6, "latin"),
    (0x00F8, 0x02AF, "latin"),
    (0x0370, 0x03FF, "greek"),
    (0x0400, 0x052F, "cyrillic"),
    (0x0531, 0x058F, "armenian"),
    (0x0591, 0x05F4, "hebrew"),
    (0x0600, 0x06FF, "arabic"),
    (0x0750, 0x077F, "arabic"),
    (0x08A0, 0x08FF, "arabic"),
    (0x0900, 0x097F, "devanagari"),
    (0x0980, 0x09FF, "bengali"),
    (0x0A00, 0x0A7F, "gurmukhi"),
    (0x0A80, 0x0AFF, "gujarati"),
    (0x0B80, 0x0BFF, "tamil"),
    (0x0C00, 0x0C7F, "telugu"),
    (0x0C80, 0x0CFF, "kannada"),
    (0x0D00, 0x0D7F, "malayalam"),
    (0x0E00, 0x0E7F, "thai"),
    (0x0E80, 0x0EFF, "lao"),
    (0x0F00, 0x0FFF, "tibetan"),
    (0x1000, 0x109F, "burmese"),
    (0x10A0, 0x10FF, "georgian"),
    (0x1100, 0x11FF, "hangul"),
    (0x1200, 0x139F, "ethiopic"),
    (0x1780, 0x17FF, "khmer"),
    (0x1800, 0x18AF, "mongolian"),
    (0x1E00, 0x1EFF, "latin"),
    (0x1F00, 0x1FFF, "greek"),
    (0x2E80, 0x2FDF, "han"),  # radicals
    (0x3005, 0x3007, "han"),  # 々 〆 〇
    (0x3041, 0x30FA, "kana"),
    (0x30FC, 0x30FF, "kana"),
    (0x3105, 0x312F, "bopomofo"),
    (0x3130, 0x318F, "hangul"),
    (0x31A0, 0x31BF, "bopomofo"),
    (0x31F0, 0x31FF, "kana"),
    (0x3400, 0x4DBF, "han"),
    (0x4E00, 0x9FFF, "han"),
    (0xA960, 0xA97F, "hangul"),
    (0xAC00, 0xD7FF, "hangul"),
    (0xF900, 0xFAFF, "han"),
    (0xFB50, 0xFDFF, "arabic"),
    (0xFE70, 0xFEFC, "arabic"),
    (0xFF21, 0xFF3A, "latin"),
    (0xFF41, 0xFF5A, "latin"),
    (0xFF66, 0xFF9D, "kana"),
    (0x20000, 0x323AF, "han"),
)
_STARTS = [first for first, _, _ in _RANGES]

NO_LETTERS = "none"
"""Script of digits, punctuation, spaces and symbols, and language of a text without letters."""

_LANGUAGE = {"han": "chinese", "bopomofo": "chinese", "kana": "japanese", "hangul": "korean"}
_KANA_SHARE = 0.1
"""Japanese writes most nouns in han characters, but no sentence without kana."""


def script_of(character: str) -> str:
    """Name of the script of one character; `none` where it is no letter of a known one."""
    code = ord(character)
    first, last, script = _RANGES[max(0, bisect_right(_STARTS, code) - 1)]
    return script if first <= code <= last else NO_LETTERS


def count_scripts(text: str) -> Counter[str]:
    """Characters of each script in `text`."""
    counts: Counter[str] = Counter()
    for character, number in Counter(text).items():
        counts[script_of(character)] += number
    return counts


def language_of(text: str) -> str:
    """`chinese`, `japanese`, `korean`, the name of the commonest other script (`latin`, `cyrillic`), or `none`.

    A character of Chinese says as much as several letters, so they count threefold.
    """
    return likely_language(count_scripts(text))


def likely_language(counts: Mapping[str, int]) -> str:
    """As `language_of`, for a text with these characters of each script."""
    weights = {
        script: n * (3 if script in _LANGUAGE else 1) for script, n in counts.items() if script != NO_LETTERS
    }
    if not weights:
        return NO_LETTERS
    script = max(sorted(weights), key=weights.__getitem__)
    if script == "han" and counts.get("kana", 0) > _KANA_SHARE * counts["han"]:
        return "japanese"
    return _LANGUAGE.get(script, script)
