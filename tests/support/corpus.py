"""A small mixed corpus (English, Chinese, Python) and a tokenizer trained on it, once for all tests."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megallama.tokenizers.load import Tokenizer, load_tokenizer
from megallama.tokenizers.training import train_tokenizer

ENGLISH = [
    "the",
    "model",
    "reads",
    "a",
    "token",
    "and",
    "says",
    "which",
    "one",
    "comes",
    "next",
    "in",
    "text",
]
CHINESE = "语言模型从大量文本中学习下一个词的概率分布，训练需要高质量的语料。"
PYTHON = "def step(self, batch):\n    for item in batch:\n\t\tif item is None:\n            return  42\n\n\n"


def make_text(seed: int) -> str:
    """A document of some hundred bytes: English, Chinese and Python in seeded order."""
    draw = random.Random(seed)
    parts = []
    for _ in range(draw.randint(2, 8)):
        parts.append(" ".join(draw.choices(ENGLISH, k=12)) + f" {draw.randint(0, 9999)}.\n")
        start = draw.randrange(len(CHINESE))
        parts.append(CHINESE[start:] + CHINESE[:start] + "\n")
        parts.append(PYTHON.replace("step", f"step_{draw.randint(0, 99)}"))
    return "".join(parts)


def write_corpus(folder: Path, *, files: int, seed: int = 0) -> Path:
    """`files` text files in nested folders with Chinese names."""
    for number in range(files):
        path = folder / f"卷{number % 3}" / f"文件{number:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(make_text(seed + number), encoding="utf-8", newline="")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 text files."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), files=40)


@pytest.fixture(scope="session")
def tokenizer_path(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model of 500 pieces."""
    return train_tokenizer([corpus], tmp_path_factory.mktemp("tokenizer"), vocab_size=500)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    """The same, loaded."""
    return load_tokenizer(tokenizer_path)
