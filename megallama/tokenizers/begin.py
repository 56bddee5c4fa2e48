"""Which token stands before a document, or a prompt: as the tokenizer's files say, or as the user does."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from megallama.host.errors import UserError
from megallama.tokenizers.files import said_beside
from megallama.tokenizers.interface import Tokenizer

Begin = Literal["tokenizer", "always", "never"]
"""`tokenizer`: where its files say so. A bare sentencepiece model or rank file says nothing, so it is left out."""


BEGINS: tuple[Begin, ...] = get_args(Begin)


def begin_token(tokenizer: Tokenizer, begin: Begin = "tokenizer") -> int | None:
    """The token that stands before each text under `begin`; None: no token does.

    Raises:
        UserError: `begin` is none of these, or `always` and the tokenizer has no such token.
    """
    if begin not in BEGINS:
        raise UserError(f"begin-token ({begin!r}) is unknown: use {', '.join(BEGINS)}")
    if begin == "always" and tokenizer.bos_id is None:
        raise UserError(
            f"tokenizer {tokenizer.path} has no begin-of-text token: use never for the begin token, or name"
            " a bos_token in the files beside the tokenizer"
        )
    wanted = begin == "always" or (begin == "tokenizer" and tokenizer.begins_texts)
    return tokenizer.bos_id if wanted else None


def is_begin_asked_beside(file: Path) -> bool:
    """Whether a file beside the tokenizer `file` asks for a begin token before a text (`add_bos_token`).

    Raises:
        UserError: one of them cannot be read.
    """
    return next((value for _, value in said_beside(file, "add_bos_token")), False) is True
