"""Describes a tokenizer: ids, special tokens, types and scripts of its tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from megallama.corpus.script import NO_LETTERS, count_scripts
from megallama.tokenizers.begin import begin_token
from megallama.tokenizers.interface import PieceKind
from megallama.tokenizers.load import Tokenizer

SAMPLES = (
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "大规模语言模型需要 1,000 亿个词的中英文语料。",
    "The quick brown fox jumps over the lazy dog in 2024.",
    "for i in range(10):\n    print(f'{i:>4}')\n",
    "日本語の文章と 한국어 문장, русский текст, 😀",
)
"""Texts that every inspection shows."""

_SHOWN_SPECIALS = 12


def inspect_tokenizer(tokenizer: Tokenizer, texts: tuple[str, ...] = SAMPLES) -> str:
    """Sizes, special ids, kinds and scripts of the tokens, and how `texts` fall into tokens."""
    return "\n".join(_lines(tokenizer, texts))


def _lines(tokenizer: Tokenizer, texts: tuple[str, ...]) -> Iterator[str]:
    yield f"{tokenizer.path}"
    yield f"  kind and ids      {tokenizer.name}"
    yield f"  sha256            {tokenizer.sha256}"
    begin = "none" if tokenizer.bos_id is None else _named(tokenizer, tokenizer.bos_id)
    begin += ", before each text" if begin_token(tokenizer) is not None else ""
    yield f"  begin of text     {begin}"
    yield f"  end of document   {_named(tokenizer, tokenizer.eod_id)}"
    kinds: Counter[PieceKind] = Counter()
    scripts: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    special: list[int] = []
    for token in range(tokenizer.vocab_size):
        kind = tokenizer.kind(token)
        kinds[kind] += 1
        if kind is PieceKind.special:
            special.append(token)
        if kind in (PieceKind.normal, PieceKind.user):
            script, length = _script_and_length(tokenizer.surface(token))
            scripts[script] += 1
            if script == "han":
                lengths[length] += 1
    listed = ", ".join(_named(tokenizer, token) for token in special[:_SHOWN_SPECIALS])
    more = f", and {len(special) - _SHOWN_SPECIALS} more" if len(special) > _SHOWN_SPECIALS else ""
    yield f"  special           {listed}{more}"
    yield "  tokens by kind    " + ", ".join(f"{kind.value} {n:,}" for kind, n in kinds.most_common())
    yield "  text by script    " + ", ".join(f"{name} {n:,}" for name, n in scripts.most_common())
    if lengths:
        yield "  Chinese by length " + ", ".join(f"{n} characters {lengths[n]:,}" for n in sorted(lengths))
    for text in texts:
        ids = tokenizer.encode(text)
        yield ""
        yield f"  {text!r}"
        yield "  " + "|".join(_shown(tokenizer, token) for token in ids)
        restored = tokenizer.decode(ids) == text
        yield (
            f"  {len(text)} characters, {len(ids)} tokens ({len(ids) / max(1, len(text)):.2f} a character)"
            + ("" if restored else f"; decodes to {tokenizer.decode(ids)!r}")
        )


def _named(tokenizer: Tokenizer, token: int) -> str:
    return f"{tokenizer.label(token)} ({token})"


def _shown(tokenizer: Tokenizer, token: int) -> str:
    surface = tokenizer.surface(token)
    try:
        return surface.decode("utf-8").replace("\n", "\\n") or tokenizer.label(token)
    except UnicodeDecodeError:
        return "".join(f"<{byte:02X}>" for byte in surface)


def _script_and_length(surface: bytes) -> tuple[str, int]:
    try:
        text = surface.decode("utf-8").strip()
    except UnicodeDecodeError:
        return "parts of characters", 0
    found = set(count_scripts(text)) - {NO_LETTERS}
    if not found:
        return "no letters", len(text)
    return (found.pop() if len(found) == 1 else "mixed"), len(text)
