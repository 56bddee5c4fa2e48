"""A complete small configuration and stand-ins for what `check` looks into, shared by the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megallama.config.check import check
from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.host.errors import UserError
from megallama.huggingface.names import canonical_tensors

COMPLETE = [
    "model=llama_tiny",
    "train.steps=100",
    "train.seq_len=64",
    "train.global_batch_size=8",
    "optim.lr=1e-3",
    "data.sources=[corpus]",
]
"""All that a run needs besides its folder."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, and the manifest of data made with it."""

    name: str = "sentencepiece-512"
    vocab_size: int = 512
    sha256: str = "a" * 64
    eod_id: int = 2
    begin_id: int | None = None

    @property
    def tokenizer_name(self) -> str:
        return self.name

    @property
    def tokenizer_sha256(self) -> str:
        return self.sha256


def small_run(folder: Path, *overrides: str) -> RunConfig:
    """COMPLETE with `overrides`; relative paths lie in `folder`."""
    return load_config([*COMPLETE, "train.run_dir=run", *overrides], working_dir=folder)


def problems_of(
    config: RunConfig,
    *,
    world_size: int | None = 1,
    damaged: dict[str, str] | None = None,
    manifest: Vocabulary | dict[str, Vocabulary] | None = None,
    tokenizer: Vocabulary | UserError | None = None,
) -> list[str]:
    """What `check` finds; token files are whole but for `damaged` (last part of the path -> problem).

    `manifest` is that of all data, or has those of some by the last part of their path.
    """

    def check_token_file(prefix: str) -> list[str]:
        problem = (damaged or {}).get(Path(prefix).name)
        return [problem] if problem else []

    def read_manifest(prefix: str) -> Vocabulary | None:
        if Path(prefix).name in (damaged or {}):
            raise UserError("the manifest is damaged too")
        return manifest.get(Path(prefix).name) if isinstance(manifest, dict) else manifest

    def load_tokenizer(path: str) -> Vocabulary:
        if isinstance(tokenizer, UserError):
            raise tokenizer
        return tokenizer or Vocabulary()

    return check(
        config,
        world_size=world_size,
        check_token_file=check_token_file,
        read_manifest=read_manifest,
        load_tokenizer=load_tokenizer,
        parameter_names=canonical_tensors,
    )
