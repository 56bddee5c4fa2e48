"""A workplace as a user has it after `megallama prepare`: corpus, tokenizer and token files, made once."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from megallama.prepare.run import prepare
from megallama.tokenizers.training import train_tokenizer
from megallama.tokens.manifest import SUFFIXES
from megallama.tokens.token_file import write_token_file

VOCAB_SIZE = 384
TEXT = (
    "The model reads a token and says which one comes next. 语言模型学习下一个词的概率分布。\n"
    "def step(batch):\n    return [item for item in batch if item]\n"
)


@dataclass(frozen=True)
class Workplace:
    """The folder of one test; commands are run in it."""

    folder: Path

    @property
    def run_dir(self) -> Path:
        """Where runs go unless told otherwise."""
        return self.folder / "runs" / "one"

    @property
    def arguments(self) -> list[str]:
        """A complete run of 4 steps."""
        return [
            "model=llama_tiny",
            f"model.vocab_size={VOCAB_SIZE}",
            "precision.dtype=fp32",
            "train.seq_len=32",
            "train.micro_batch_size=1",
            "train.global_batch_size=4",
            "train.steps=4",
            "train.run_dir=runs/one",
            "optim.lr=1e-3",
            "data.sources=[data/train]",
            "data.tokenizer=tokenizer",
            "log.tensorboard=false",
            "log.wandb=disabled",
        ]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus/, tokenizer/, other_tokenizer/ (other digits, as many ids) and data/.

    Beside data/train there are a copy of it (副本) and 101 tokens without a manifest (短).
    """
    folder = tmp_path_factory.mktemp("prepared")
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(12):
        (corpus / f"文{number}.txt").write_text(f"{number} {TEXT * 3}", encoding="utf-8")
    train_tokenizer([corpus], folder / "tokenizer", vocab_size=VOCAB_SIZE)
    train_tokenizer([corpus], folder / "other_tokenizer", vocab_size=VOCAB_SIZE, split_digits=False)
    prepare([corpus], folder / "data", tokenizer=folder / "tokenizer", validation_fraction=0, workers=1)
    for suffix in SUFFIXES:
        shutil.copy(folder / f"data/train{suffix}", folder / f"data/副本{suffix}")
    write_token_file(folder / "data/短", [range(101)])
    (folder / "runs").mkdir()
    return folder


@pytest.fixture
def workplace(prepared: Path, tmp_path: Path) -> Workplace:
    """A copy of `prepared` that the test may spoil."""
    shutil.copytree(prepared, tmp_path / "work")
    return Workplace(tmp_path / "work")
