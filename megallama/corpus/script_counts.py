"""Counts the characters of each script in large texts, with a lookup table."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from megallama.corpus.script import script_of

_HIGH_SURROGATES = range(0xD800, 0xDC00)
_LOW_SURROGATES = range(0xDC00, 0xE000)


@lru_cache(maxsize=1)
def _table() -> tuple[tuple[str, ...], npt.NDArray[np.uint8]]:
    """(scripts, number of the script of each UTF-16 unit); low halves of pairs are nothing."""
    names: dict[str, int] = {"": 0}
    table = np.zeros(1 << 16, dtype=np.uint8)
    for unit in range(1 << 16):
        if unit in _LOW_SURROGATES:
            continue
        # A pair's high half stands for 1024 characters, of one script but for unassigned ones.
        code = ((unit - 0xD800) << 10) + 0x10000 if unit in _HIGH_SURROGATES else unit
        table[unit] = names.setdefault(script_of(chr(code)), len(names))
    return tuple(names), table


def count_characters(text: str) -> dict[str, int]:
    """Characters of each script that occurs in `text`; `none`: digits, punctuation, spaces."""
    names, table = _table()
    units = np.frombuffer(text.encode("utf-16-le"), dtype=np.uint16)
    counts = np.bincount(table[units], minlength=len(names))
    return {name: int(count) for name, count in zip(names[1:], counts[1:], strict=True) if count}
