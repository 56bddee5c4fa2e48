"""tiktoken's rank files, as LLaMA 3 and Qwen publish them: per token its bytes in base64 and its rank.

A rank file says neither how text is cut before the merges nor which special tokens there are. Both follow from the
number of ranks for the families below; a file `tiktoken.json` beside the ranks says them for any other.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tiktoken

from megallama.host.errors import UserError
from megallama.tokenizers.begin import is_begin_asked_beside
from megallama.tokenizers.files import RANKS_SIDE_FILE
from megallama.tokenizers.interface import PieceKind, Tokenizer, read_tokenizer_file

_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")

# Which runs of characters are merged on their own. Part of each family's definition, so written as published.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_PATTERN = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_QWEN_PATTERN = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_QWEN35_PATTERN = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)

# What \s is to tiktoken's engine (Unicode's White_Space); Python's has some control characters more.
_WHITE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONG_RUN = re.compile(f"[{_WHITE}]{{{1 << 14},}}")
_WORDS = {_LLAMA3_PATTERN: "LN", _QWEN_PATTERN: "LN", _QWEN35_PATTERN: "LNM"}
"""First letters of the Unicode categories that are no punctuation in a pattern."""


@dataclass(frozen=True)
class RankFamily:
    """What a rank file leaves out."""

    pattern: str
    """Regular expression of the pieces within which merges happen."""
    special_tokens: dict[str, int]
    end: str
    """Name of the end-of-text token."""
    begin: str | None = None
    """Name of the begin-of-text token."""
    normalization: str | None = None
    """Unicode normal form of the text before anything else."""


def _llama3(first: int) -> RankFamily:
    """LLaMA 3 to 3.3: 256 special tokens, all but a few of them reserved."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"]
    names += ["<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>"]
    names += ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
    names += ["<|image|>"]
    names += [f"<|reserved_special_token_{number}|>" for number in range(2, 2 + 256 - len(names))]
    return RankFamily(_LLAMA3_PATTERN, _numbered(names, first), names[1], names[0])


def _qwen(first: int) -> RankFamily:
    """Qwen: three special tokens and 205 free ones."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
    return RankFamily(_QWEN_PATTERN, _numbered(names, first), names[0], normalization="NFC")


def _qwen35(first: int) -> RankFamily:
    """Qwen 3.5 and 3.6: the special tokens of chat, vision, tools, code and speech."""
    words = "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end"
    words += " vision_start vision_end vision_pad image_pad video_pad"
    names = [f"<|{word}|>" for word in words.split()]
    names += ["<tool_call>", "</tool_call>"]
    names += [
        "<|fim_prefix|>",
        "<|fim_middle|>",
        "<|fim_suffix|>",
        "<|fim_pad|>",
        "<|repo_name|>",
        "<|file_sep|>",
    ]
    names += [
        "<tool_response>",
        "</tool_response>",
        "<think>",
        "</think>",
        "<|audio_start|>",
        "<|audio_end|>",
    ]
    names += ["<tts_pad>", "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>", "<|audio_pad|>"]
    return RankFamily(_QWEN35_PATTERN, _numbered(names, first), names[0], normalization="NFC")


def _numbered(names: Sequence[str], first: int) -> dict[str, int]:
    return {name: first + index for index, name in enumerate(names)}


_FAMILIES = {128_000: _llama3, 151_643: _qwen, 248_044: _qwen35}
"""By the number of ranks; special tokens follow them."""


def is_rank_file(content: bytes) -> bool:
    """Whether `content` begins like a rank file."""
    return _RANK_LINE.match(content) is not None


class RankTokenizer(Tokenizer):
    """A tiktoken rank file."""

    def __init__(self, path: Path) -> None:
        content = read_tokenizer_file(path)
        ranks = _parse(path, content)
        side = path.with_name(RANKS_SIDE_FILE)
        digest = hashlib.sha256(content)
        if side.is_file():
            described = read_tokenizer_file(side)
            digest.update(described)
            family = _described(side, described, ranks)
        elif len(ranks) in _FAMILIES:
            family = _FAMILIES[len(ranks)](len(ranks))
        else:
            raise UserError(
                f"tokenizer {path} is a rank file of no known family ({len(ranks)} ranks): put a"
                f' {RANKS_SIDE_FILE} with "pattern", "special_tokens" and "eos_token" beside it'
            )
        self.path = path
        self.sha256 = digest.hexdigest()
        self.family = family
        self._special = {number: name for name, number in family.special_tokens.items()}
        self._surfaces = {rank: token for token, rank in ranks.items()}
        self.ranks = ranks
        try:
            self._encoding = tiktoken.Encoding(
                path.name,
                pat_str=family.pattern,
                mergeable_ranks=ranks,
                special_tokens=family.special_tokens,
            )
        except (
            Exception
        ) as error:  # what its compiled part raises for a bad pattern is a plain ValueError, or worse
            raise UserError(f"tokenizer {path} cannot be used ({error}): mend {RANKS_SIDE_FILE}") from error
        self.vocab_size = max(*self._surfaces, *self._special) + 1
        self.name = f"tiktoken-{self.vocab_size}"
        self.eod_id = family.special_tokens[family.end]
        self.bos_id = family.special_tokens[family.begin] if family.begin else None
        self.begins_texts = is_begin_asked_beside(path)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        text.encode("utf-8")
        text = self._normal(text)
        if self.family.pattern in _WORDS and LONG_RUN.search(text):
            return [token for part in self._parts(text) for token in part]
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return b"".join(self.surface(i) for i in self._check_ids(ids)).decode("utf-8", errors="replace")

    def kind(self, token: int) -> PieceKind:
        """See `Tokenizer`."""
        if token in self._special:
            return PieceKind.special
        if token not in self._surfaces:
            return PieceKind.unused
        return PieceKind.byte if len(self._surfaces[token]) == 1 else PieceKind.normal

    def surface(self, token: int) -> bytes:
        """See `Tokenizer`."""
        return self._surfaces.get(token, b"")

    def label(self, token: int) -> str:
        """See `Tokenizer`."""
        surface = self.surface(token)
        try:
            return self._special.get(token) or surface.decode("utf-8")
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in surface)

    def split(self, surface: bytes) -> list[int]:
        """See `Tokenizer`."""
        if surface in self.ranks:
            return [self.ranks[surface]]
        try:
            return self._encoding.encode_ordinary(surface.decode("utf-8"))
        except UnicodeDecodeError:
            return [self.ranks[surface[i : i + 1]] for i in range(len(surface))]

    def _parts(self, text: str) -> Iterator[list[int]]:
        """Ids of `text`, with long runs of white space cut out where `_SPACES` cuts.

        tiktoken 0.14's engine follows that expression with a stack that overflows after some hundred thousand
        characters. It means: of a run all up to its last line end is one piece, then all but its last character, which
        goes with what follows, if anything does. Line ends behind punctuation belong to that.
        """
        words = _WORDS[self.family.pattern]
        start = 0
        for run in LONG_RUN.finditer(text):
            first, end = run.span()
            if first and unicodedata.category(text[first - 1])[0] not in words:
                first += len(run[0]) - len(run[0].lstrip("\r\n"))
            last_line = first + max(run[0][first - run.start() :].rfind(mark) for mark in "\r\n") + 1
            last = end if end == len(text) else max(last_line, end - 1)
            yield self._encoding.encode_ordinary(text[start:first])
            for piece in (text[first:last_line], text[last_line:last]):
                yield self._undivided.encode_ordinary(piece)
            start = last
        yield self._encoding.encode_ordinary(text[start:])

    @cached_property
    def _undivided(self) -> tiktoken.Encoding:
        """The merges alone: any text is one piece."""
        return tiktoken.Encoding(
            self.path.name, pat_str=r"(?s).+", mergeable_ranks=self.ranks, special_tokens={}
        )

    def _normal(self, text: str) -> str:
        form: Any = self.family.normalization
        return unicodedata.normalize(form, text) if form else text


def _parse(path: Path, content: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"tokenizer {path} is damaged (line {number} is no base64 token and rank): copy it again"
            ) from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or len(set(ranks.values())) != len(ranks):
        why = f"{len(missing)} single bytes are missing" if missing else "two tokens have one rank"
        raise UserError(f"tokenizer {path} is damaged ({why}): copy it again")
    return ranks


def _described(side: Path, content: bytes, ranks: dict[bytes, int]) -> RankFamily:
    """The family that a side file describes."""
    try:
        described = json.loads(content)
        special = {str(name): int(number) for name, number in described["special_tokens"].items()}
        family = RankFamily(
            pattern=str(described["pattern"]),
            special_tokens=special,
            end=str(described["eos_token"]),
            begin=described.get("bos_token"),
            normalization=described.get("normalization"),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{side} cannot be understood ({error!r}): correct or remove it") from error
    for key, name in (("eos_token", family.end), ("bos_token", family.begin)):
        if name is not None and name not in special:
            raise UserError(f"{side}: {key} ({name!r}) is not among special_tokens: mend it")
    if len(set(special.values())) != len(special) or set(special.values()) & set(ranks.values()):
        raise UserError(f"{side}: a special token has the id of another token: mend it")
    if family.normalization not in (None, "NFC", "NFD", "NFKC", "NFKD"):
        raise UserError(f"{side}: normalization ({family.normalization!r}) must be NFC, NFD, NFKC or NFKD")
    return family
