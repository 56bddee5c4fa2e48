"""The likely encoding of bytes that are not UTF-8, for the message that refuses them."""

from __future__ import annotations

import codecs

_SAMPLE_BYTES = 4096
_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"} | {
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# iconv's name, the standard by which characters are common, and their first bytes in it: the sets of East Asia put the
# thousands of everyday use before the others. The order decides between equals.
_COMMON = {
    "EUC-KR": ("euc_kr", range(0xB0, 0xC9)),
    "GB18030": ("gb2312", range(0xB0, 0xD8)),
    "BIG5": ("big5", range(0xA4, 0xC7)),
    "EUC-JP": ("euc_jp", (0xA4, 0xA5, *range(0xB0, 0xD0))),
    "SHIFT_JIS": ("shift_jis", (0x82, 0x83, *range(0x88, 0x98))),
}
_LEAST_SHARE = 0.6
_LEAST_UTF8 = 0.7
_LEAST_KOREAN_BYTES = 40
"""Its letters have the bytes of the first half of the common Chinese characters: only a longer text can tell."""
_LEAST_LATIN = 3
_LEAST_NULS = 0.004


def likely_encoding(content: bytes, at: int) -> str | None:
    """iconv's name of the encoding of `content`, which is not UTF-8 at byte `at`; None where nothing speaks for one.

    Judged by how common the characters would be that a piece of it means; what is UTF-8 but for some bytes has none.
    """
    for mark, name in _MARKS.items():
        if content.startswith(mark):
            return name
    if is_mostly_utf8(content, at):
        return None
    start = content.rfind(b"\n", 0, at) + 1
    if at - start > _SAMPLE_BYTES // 2:
        start = at
    sample = content[start : start + _SAMPLE_BYTES]
    if sample.count(0) > _LEAST_NULS * len(sample):
        little, big = (sum(map(sample.count, marks)) for marks in ((b"\n\0", b" \0"), (b"\0\n", b"\0 ")))
        return "UTF-16LE" if little >= big else "UTF-16BE"
    shares = {name: _common_share(sample, name) for name in _COMMON}
    if sum(byte >= 0x80 for byte in sample) < _LEAST_KOREAN_BYTES:
        del shares["EUC-KR"]
    best = max(shares, key=shares.__getitem__)
    if shares[best] > _LEAST_SHARE:
        return best
    return "WINDOWS-1252" if _is_latin(sample) else None


def is_mostly_utf8(content: bytes, at: int) -> bool:
    """Whether most bytes beyond ASCII around byte `at` of `content` are part of whole UTF-8 characters."""
    sample = content[max(0, at - _SAMPLE_BYTES) : at + _SAMPLE_BYTES]
    beyond = sum(byte >= 0x80 for byte in sample)
    whole = sum(len(c.encode()) for c in sample.decode("utf-8", "ignore") if c >= "\x80")
    return whole > _LEAST_UTF8 * beyond


def _common_share(sample: bytes, encoding: str) -> float:
    """Share of common characters among those beyond ASCII; 0 where `sample` cannot be of `encoding`."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(sample)
    except UnicodeDecodeError:
        return 0.0
    standard, first_bytes = _COMMON[encoding]
    common = beyond = 0
    for character in text:
        if character >= "\x80":
            place = character.encode(standard, "ignore")
            # Punctuation is the same in all of them.
            common += "\u3000" <= character <= "\u303f" or (len(place) == 2 and place[0] in first_bytes)
            beyond += 1
    return common / max(1, beyond)


def _is_latin(sample: bytes) -> bool:
    """Letters with accents one by one among ASCII."""
    padded = b" " + sample + b" "
    places = [i for i, byte in enumerate(padded) if byte >= 0x80]
    alone = sum(padded[i - 1] < 0x80 and padded[i + 1] < 0x80 and padded[i] >= 0xC0 for i in places)
    return alone >= _LEAST_LATIN and 2 * alone > len(places)
