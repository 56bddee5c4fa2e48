"""Checksums of token files for tests."""

from __future__ import annotations

from pathlib import Path

from megallama.tokens.checksums import compare_checksums


def checksum_problems(prefix: str | Path) -> list[str]:
    """What `compare_checksums` finds."""
    problems: list[str] = []
    for _ in compare_checksums(prefix, problems):
        pass
    return problems
