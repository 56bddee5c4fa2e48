"""Preparation takes no more memory for a larger corpus, not even where all of it is one compressed file."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.conftest import CHINESE

PROGRAM = """
import re, sys
from pathlib import Path
from megallama.data.prepare import prepare

tokenizer, *inputs = sys.argv[1:]
for path in inputs:
    shards = 50_000 if "shards" in path else None
    report = prepare([path], path + ".out", tokenizer=tokenizer, workers=1, shard_tokens=shards)
    assert report.train.tokens > 5 * report.train.documents, report
    print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
LIMIT_MIB = 3


def write_archive(path: Path, *, documents: int) -> str:
    lines = (json.dumps({"text": CHINESE[n % 13 :]}, ensure_ascii=False) + "\n" for n in range(documents))
    path.write_bytes(gzip.compress("".join(lines).encode(), 1))
    return str(path)


@pytest.mark.parametrize("name", ["一.jsonl.gz", "shards.jsonl.gz"])
def test_ten_times_the_archive_takes_no_more_memory(tokenizer_path: Path, tmp_path: Path, name: str) -> None:
    small = write_archive(tmp_path / name, documents=20_000)
    large = write_archive(tmp_path / f"大{name}", documents=200_000)
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tokenizer_path), small, large],
        capture_output=True,
        text=True,
        check=True,
    )
    peaks = [int(number) / 1024 for number in re.findall(r"\d+", found.stdout)]
    assert peaks[1] - peaks[0] < LIMIT_MIB, peaks
