"""UTF-8 inside, whatever the locale: for files that libraries open, what is printed, and text on the command line."""

from __future__ import annotations

import codecs
import contextlib
import io
import locale
import os
import sys
from pathlib import Path

REMEDY = "type it in a terminal that is set to UTF-8, with LC_ALL=C.UTF-8"

_LOCALES = ("C.UTF-8", "C.utf8", "en_US.UTF-8")


def use_utf8() -> None:
    """Let `open` mean UTF-8 in this process where no encoding is named, and let nothing that is printed fail.

    Libraries read their own files without naming an encoding (torch 2.13 while it is imported), and Python then takes
    that of the locale. File names stay in the locale's encoding, as they are on the disk. What the terminal cannot show
    becomes a question mark.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if _is_utf8(locale.getpreferredencoding(False)):
        return
    for name in _LOCALES:
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, name)
            return


def is_text(argument: str) -> bool:
    """Whether an argument of the command line could be decoded; Python marks the bytes that could not."""
    return not any("\ud800" <= mark <= "\udfff" for mark in argument)


def text_of(argument: str) -> str:
    """An argument as text: UTF-8 if its bytes are that, else as the locale says.

    Raises:
        ValueError: it is neither.
    """
    with contextlib.suppress(UnicodeError):
        return _bytes_of(argument).decode("utf-8")
    if is_text(argument):
        return argument
    raise ValueError(f"{argument!a} {not_text()}: {REMEDY}")


def not_text() -> str:
    """What to say of an argument that could not be decoded."""
    others = (
        ""
        if _is_utf8(sys.getfilesystemencoding())
        else f", nor in the locale's {sys.getfilesystemencoding()}"
    )
    return f"is not in UTF-8{others}"


def _bytes_of(argument: str) -> bytes:
    """What was typed. Python's codec of an encoding and the C library's, which decoded it, need not agree."""
    with contextlib.suppress(OSError):
        typed = Path("/proc/self/cmdline").read_bytes().removesuffix(b"\0").split(b"\0")
        for word, raw in zip(reversed(sys.argv), reversed(typed), strict=False):
            if word == argument:
                return raw
            if word.startswith("--") and word.partition("=")[2] == argument:
                return raw.partition(b"=")[2]
    return os.fsencode(argument)


def _is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name == "utf-8"
