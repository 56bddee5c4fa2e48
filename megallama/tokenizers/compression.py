"""Tokens per character of a tokenizer, for each language of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megallama.corpus.corpus import Documents, Reading, empty_corpus, expand_inputs, stream_documents
from megallama.corpus.script import language_of
from megallama.tokenizers.load import Tokenizer
from megallama.tokenizers.training import sample_lines

ALL_LANGUAGES = "all"


@dataclass
class Compression:
    """Counts over the lines of one language."""

    characters: int = 0
    """Characters of the lines."""
    tokens: list[int] = field(default_factory=list)
    """Tokens under each tokenizer."""
    changed_lines: list[int] = field(default_factory=list)
    """Lines that each tokenizer does not decode to themselves."""

    def tokens_per_character(self, index: int) -> float:
        """Tokens of tokenizer `index` for one character."""
        return self.tokens[index] / max(1, self.characters)


def measure_compression(lines: Sequence[str], tokenizers: Sequence[Tokenizer]) -> dict[str, Compression]:
    """Counts by language, most characters first, then `all`."""
    found: dict[str, Compression] = {}
    for line in lines:
        tokens, changed = [], []
        for tokenizer in tokenizers:
            ids = tokenizer.encode(line)
            tokens.append(len(ids))
            changed.append(int(tokenizer.decode(ids) != line))
        for name in (language_of(line), ALL_LANGUAGES):
            entry = found.setdefault(
                name, Compression(tokens=[0] * len(tokenizers), changed_lines=[0] * len(tokenizers))
            )
            entry.characters += len(line)
            entry.tokens = [a + b for a, b in zip(entry.tokens, tokens, strict=True)]
            entry.changed_lines = [a + b for a, b in zip(entry.changed_lines, changed, strict=True)]
    names = sorted(found, key=lambda name: (name == ALL_LANGUAGES, -found[name].characters))
    return {name: found[name] for name in names}


def compression_table(counts: dict[str, Compression], names: Sequence[str]) -> str:
    """The counts as lines of text, a column for each tokenizer."""
    width = max(12, *(len(name) for name in names))
    rows = [
        f"{'language':<12}{'characters':>14}" + "".join(f"{name:>{width + 2}}" for name in names),
    ]
    for language, entry in counts.items():
        row = f"{language:<12}{entry.characters:>14,}"
        rows.append(
            row + "".join(f"{entry.tokens_per_character(i):>{width + 2}.3f}" for i in range(len(names)))
        )
    return "\n".join(rows)


def sample_text(
    inputs: Sequence[str | Path],
    *,
    sample_bytes: int,
    seed: int,
    suffixes: Sequence[str] = (),
    documents: Documents = "file",
    separator: str = "",
    text_field: str = "text",
) -> list[str]:
    """Lines of `inputs`, at most `sample_bytes`, each with the same chance.

    Raises:
        UserError: inputs that `expand_inputs` or `stream_documents` refuse, or without text.
    """
    files = expand_inputs(inputs, suffixes=suffixes, text_field=text_field)
    reading = Reading(documents=documents, text_field=text_field, separator=separator)
    texts = (document.text for document in stream_documents(files, reading=reading))
    lines = sample_lines(texts, seed=seed, sample_bytes=sample_bytes)
    if not lines:
        raise empty_corpus(files)
    return lines
