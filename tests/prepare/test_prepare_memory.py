"""Preparation takes no more memory for a larger corpus, not even where all of it is one compressed file."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

from tests.support.corpus import CHINESE

PROGRAM = """
import re, sys
from pathlib import Path
from megallama.prepare.run import prepare

tokenizer, *inputs = sys.argv[1:]
for path in inputs:
    prepare([path], path + ".out", tokenizer=tokenizer, workers=1, shard_tokens=200_000)
    print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
LIMIT_MIB = 6
"""Of tokens and lengths there are 20 MiB more."""


def write_archive(path: Path, *, documents: int) -> str:
    lines = (json.dumps({"text": CHINESE[n % 13 :]}, ensure_ascii=False) + "\n" for n in range(documents))
    path.write_bytes(gzip.compress("".join(lines).encode(), 1))
    return str(path)


def test_ten_times_the_archive_takes_no_more_memory(tokenizer_path: Path, tmp_path: Path) -> None:
    small = write_archive(tmp_path / "小.jsonl.gz", documents=12_000)
    large = write_archive(tmp_path / "大.jsonl.gz", documents=120_000)
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tokenizer_path), small, large],
        capture_output=True,
        text=True,
        check=True,
    )
    peaks = [int(number) / 1024 for number in re.findall(r"\d+", found.stdout)]
    assert peaks[1] - peaks[0] < LIMIT_MIB, peaks
