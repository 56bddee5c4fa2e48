#!/usr/bin/env python
"""The whole way from raw text to a model that writes, on any machine: each step is a command that you could type.

The corpus is the Python standard library that runs this program; nothing is downloaded.
"""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from megallama.host.log import quiet_libraries
from megallama.host.utf8 import use_utf8

ROOT = Path(__file__).resolve().parents[1]
BUILD = Path("build/demo")
TOKENIZER = BUILD / "tokenizer" / "tokenizer.model"
DATA = BUILD / "data"
RUN_DIR = Path("runs/demo")
VOCAB_SIZE = 2048
RANKS = 2
PROMPT = 'def read_config(path):\n    """'

PACKAGES = (
    *("asyncio", "collections", "concurrent", "ctypes", "curses", "dbm", "distutils", "email", "http"),
    *("importlib", "json", "logging", "multiprocessing", "re", "sqlite3", "tkinter", "tomllib", "unittest"),
    *("urllib", "venv", "wsgiref", "xml", "xmlrpc", "zipfile", "zoneinfo"),
)
"""Folders of the standard library with code of the usual kind; left out are its tests and tables."""


def main() -> int:
    """Run the steps; returns the exit code of the first that fails."""
    use_utf8()
    os.chdir(ROOT)
    quiet_libraries()
    begun = time.monotonic()
    try:
        if not TOKENIZER.exists():
            say("1. Train a tokenizer on the standard library's sources")
            command(
                "megallama", "tokenizer", "train", *corpus(), "--suffix", ".py",
                "--vocab-size", str(VOCAB_SIZE), "--sample-mb", "8", "--output", str(TOKENIZER.parent),
            )  # fmt: skip
        if not (DATA / "train.idx").exists():
            say("2. Tokenize them, split by file into training and validation data")
            command(
                "megallama", "prepare", *corpus(), "--suffix", ".py",
                "--tokenizer", str(TOKENIZER), "--validation-fraction", "0.03", "--output", str(DATA),
            )  # fmt: skip
        say(f"3. Train a small LLaMA on {RANKS} ranks (an interrupted run goes on where it stood)")
        command("megallama", "train", "--nproc-per-node", str(RANKS), "+exp=demo")
        unigram = unigram_perplexity()
        say("4. Look at it")
        command("megallama", "plot", str(RUN_DIR), "--unigram-perplexity", f"{unigram:.1f}")
        command(
            "megallama", "generate", str(RUN_DIR), "--prompt", PROMPT,
            "--max-new-tokens", "160", "--temperature", "0.6", "--top-p", "0.95",
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        return error.returncode
    summary(unigram, seconds=time.monotonic() - begun)
    return 0


def corpus() -> list[str]:
    """The standard library's modules and the folders of PACKAGES that this Python has."""
    library = Path(sysconfig.get_paths()["stdlib"])
    folders = [str(library / name) for name in PACKAGES if (library / name).is_dir()]
    return [str(library / "*.py"), *folders]


def shortened(words: Sequence[str]) -> str:
    """The command for people: of the folders of the corpus the first one stands for all."""
    first, *others = corpus()
    shown = [word for word in words if word not in others]
    text = shlex.join(shown)
    return text.replace(shlex.quote(first), f"{shlex.quote(first)} [and {len(others)} folders]")


def command(*words: str) -> None:
    """Show a command and run it with the programs of this environment."""
    print(f"$ {shortened(words)}\n", flush=True)
    programs = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"}
    # The same demo everywhere: one GPU would be too few for its ranks.
    environment["CUDA_VISIBLE_DEVICES"] = ""
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // RANKS)))
    subprocess.run(words, check=True, env=environment)
    print(flush=True)


def say(text: str) -> None:
    """A heading."""
    print(f"\n== {text} ==\n", flush=True)


def unigram_perplexity() -> float:
    """Perplexity of guessing by word frequency alone."""
    from megallama.tokens.statistics import unigram_loss

    return math.exp(unigram_loss(str(DATA / "train"), str(DATA / "valid"), vocab_size=VOCAB_SIZE))


def summary(unigram: float, *, seconds: float) -> None:
    """What came out, and what to do next."""
    from megallama.metrics.jsonl import load_metrics

    perplexity = [
        row["eval/perplexity"] for row in load_metrics(RUN_DIR / "metrics.jsonl") if "eval/perplexity" in row
    ]
    say("Done")
    print(
        f"""validation perplexity {perplexity[0]:.0f} -> {perplexity[-1]:.1f}
guessing by frequency alone: {unigram:.0f}; {seconds:.0f} s in all

The loss plot is {RUN_DIR / "loss.png"}, every number is in {RUN_DIR / "metrics.jsonl"}. Next:

  source .venv/bin/activate
  megallama generate {RUN_DIR} --prompt 'import os' --temperature 0
  # the same run in other layouts
  megallama train --nproc-per-node 2 +exp=demo train.run_dir=runs/tp2 parallel.tp=2
  megallama train --nproc-per-node 2 +exp=demo train.run_dir=runs/pp2 parallel.pp=2
  # your own text
  megallama tokenizer train my_text/ --vocab-size 8000 --output build/mine/tokenizer
  # before a cluster run
  megallama check +exp=llama2_7b --world-size 64"""
    )


if __name__ == "__main__":
    sys.exit(main())
