"""The complete check of a run before it starts: configuration, files, tokenizer, run folder.

No torch, so it is instant; `train.init_from` alone needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megallama.config.check import check_config
from megallama.config.schema import RunConfig
from megallama.host.errors import ConfigError
from megallama.huggingface.names import canonical_tensors
from megallama.stream.open import data_problems
from megallama.tokenizers.load import load_tokenizer
from megallama.tokens.manifest import check_token_file, read_manifest


def check_run(config: RunConfig, *, world_size: int | None) -> None:
    """All problems of a run at once, before any process group, allocation or file.

    Args:
        config: The run.
        world_size: Number of ranks; None where it is not known yet.

    Raises:
        ConfigError: what is wrong, each with its remedy.
    """
    check_config(
        config,
        world_size=world_size,
        check_token_file=check_token_file,
        read_manifest=read_manifest,
        load_tokenizer=lambda path: load_tokenizer(Path(path)),
        parameter_names=canonical_tensors,
        data_problems=data_problems,
        check_weights=_check_weights,
    )


def check_runs(configs: Sequence[RunConfig], *, world_size: int | None) -> None:
    """As `check_run` for several runs: the problems of all, each told once.

    Raises:
        ConfigError: what is wrong, each with its remedy.
    """
    problems: dict[str, None] = {}
    for config in configs:
        try:
            check_run(config, world_size=world_size)
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise ConfigError(list(problems))


def _check_weights(config: RunConfig) -> list[str]:
    # Imported here: it needs torch, which a run that starts from random weights need not wait for.
    from megallama.trainer.init_from import source_problems

    path = str(config.train.init_from)
    own = Path(config.train.run_dir) / "checkpoints"
    return source_problems(Path(path), model=config.model, own=own)
