"""The data benchmark: its synthetic files are what the loader reads, and its report has a ratio for each figure."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks.data_loader import NAMES, measure, report, write_sparse
from megallama.tokens.token_file import TokenFile


@pytest.fixture
def prefixes(tmp_path: Path) -> list[str]:
    """Two sources of about 40,000 tokens."""
    for number, name in enumerate(NAMES):
        write_sparse(tmp_path / name, tokens=40_000, mean_length=100, seed=number)
    return [str(tmp_path / name) for name in NAMES]


def test_synthetic_tokens_are_a_token_file(prefixes: list[str]) -> None:
    file = TokenFile(prefixes[0])
    assert file.num_documents == 400 and 30_000 < file.num_tokens < 50_000
    assert set(file.view(0, 100).tolist()) == {0} and len(set(file.document_lengths.tolist())) > 50


def test_every_figure_is_a_ratio(prefixes: list[str], tmp_path: Path) -> None:
    options = argparse.Namespace(folder=str(tmp_path), tokens=80_000, seq_len=64, batch=4, steps=5)
    rounds = {kind: [measure(kind, prefixes, options)] for kind in ("ours", "cut")}
    other = {name: 2 * value for name, value in rounds["ours"][0].items() if name != "seek_10_million_s"}
    lines = list(report({**rounds, "megatron": [other]}))
    ratios = {line[:22].strip(): line[50:59].strip() for line in lines[1:]}
    for name in ("index_s", "tokens_per_s", "tokens_per_cpu_s", "seek_10_s"):
        assert ratios[name] == "0.500", lines
    assert {"index_mib", "cut index_s", "cut index_mib", "seek_10_million_s"} < set(ratios)
    assert all(float(ratio) >= 0 for ratio in ratios.values())
