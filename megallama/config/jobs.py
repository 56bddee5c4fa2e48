"""The runs of a command line: one, or with --multirun every combination of the listed values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from megallama.config.load import CONF_DIR, expand_sweep, load_config
from megallama.config.names import GROUPS
from megallama.config.schema import RunConfig
from megallama.host.errors import UserError


def load_jobs(
    overrides: Sequence[str], *, is_multirun: bool, extra_conf_dir: Path | None = None
) -> list[RunConfig]:
    """The configuration of every job; those of a multirun have folders 0, 1, ... in `train.run_dir`.

    Args:
        overrides: Words of a command line, e.g. ["+exp=llama2_7b", "parallel.tp=4,8"].
        is_multirun: Whether a word may list several values.
        extra_conf_dir: A user's own folder with model/ or exp/ files.

    Raises:
        ConfigError: as `load_config` and `expand_sweep`.
        UserError: `extra_conf_dir` is no such folder.
    """
    _check_folder(extra_conf_dir)
    if not is_multirun:
        return [load_config(overrides, extra_conf_dir=extra_conf_dir)]
    configs = []
    for index, words in enumerate(expand_sweep(overrides, conf_dir=CONF_DIR, extra_conf_dir=extra_conf_dir)):
        config = load_config(words, extra_conf_dir=extra_conf_dir)
        train = dataclasses.replace(config.train, run_dir=f"{config.train.run_dir}/{index}")
        configs.append(dataclasses.replace(config, train=train))
    return configs


def _check_folder(path: Path | None) -> None:
    if path is None or any((path / group).is_dir() for group in GROUPS):
        return
    fault = "has neither model/ nor exp/" if path.is_dir() else "is not a folder"
    raise UserError(f"--config-dir ({path}) {fault}: give the folder that contains your model/ or exp/")
