"""The complete check of a run before it starts: configuration, files, tokenizer, run folder.

It needs no torch, so it is instant. Only `train.init_from` and telling the other ranks load it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megallama.config.check import check_config, check_settings
from megallama.config.schema import RunConfig
from megallama.host.errors import ConfigError
from megallama.host.launch import LaunchEnvironment
from megallama.huggingface.names import canonical_tensors
from megallama.stream.open import data_problems
from megallama.tokenizers.load import load_tokenizer
from megallama.tokens.manifest import check_token_file, read_manifest

PATIENCE_S = 20.0
"""How long ranks that know of a problem wait for each other, to end with the same message."""


def check_run(
    config: RunConfig, *, world_size: int | None, reads_files: bool = True, is_data_given: bool = False
) -> None:
    """All problems of a run at once, before any process group, allocation or file.

    Args:
        config: The run.
        world_size: Number of ranks; None where it is not known yet.
        reads_files: Whether data, tokenizer, run folder and first weights are looked at, too.
        is_data_given: The caller trains on data of their own.

    Raises:
        ConfigError: what is wrong, each with its remedy.
    """
    if not reads_files:
        problems = check_settings(config, world_size=world_size, parameter_names=canonical_tensors)
        if problems:
            raise ConfigError(problems)
        return
    check_config(
        config,
        world_size=world_size,
        check_token_file=check_token_file,
        read_manifest=read_manifest,
        load_tokenizer=lambda path: load_tokenizer(Path(path)),
        parameter_names=canonical_tensors,
        data_problems=data_problems,
        check_weights=_check_weights,
        is_data_given=is_data_given,
    )


def check_runs(
    configs: Sequence[RunConfig],
    *,
    world_size: int | None,
    reads_files: bool = True,
    is_data_given: bool = False,
) -> None:
    """As `check_run` for several runs: the problems of all, each told once.

    Raises:
        ConfigError: what is wrong, each with its remedy.
    """
    problems: dict[str, None] = dict.fromkeys(_shared_folders(configs))
    for config in configs:
        try:
            check_run(config, world_size=world_size, reads_files=reads_files, is_data_given=is_data_given)
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise ConfigError(list(problems))


def _shared_folders(configs: Sequence[RunConfig]) -> Iterator[str]:
    """The second of two runs in one folder would go on with the first one's checkpoints."""
    known: dict[str, int] = {}
    for number, config in enumerate(configs):
        first = known.setdefault(config.train.run_dir, number)
        if first != number:
            yield (
                f"runs {first} and {number} of the sweep would share {config.train.run_dir}: put"
                " ${hydra.job.num} into hydra.sweep.subdir"
            )


def check_job(
    configs: Sequence[RunConfig], *, environment: LaunchEnvironment, job: str, is_data_given: bool = False
) -> None:
    """As `check_runs`, called by every rank: rank 0 alone opens the files, and tells the others the result.

    A thousand ranks that each read tokenizer, manifests and indexes would load the file system for nothing.

    Args:
        configs: The runs, the same on every rank.
        environment: This rank.
        job: A name for this check among those of the same processes.
        is_data_given: The caller trains on data of their own.

    Raises:
        UserError: what is wrong, each with its remedy; the same on every rank.
    """
    world_size = environment.world_size
    if world_size == 1:
        check_runs(configs, world_size=world_size, is_data_given=is_data_given)
        return
    own: Exception | None = None
    try:
        check_runs(
            configs,
            world_size=world_size,
            reads_files=environment.rank == 0,
            is_data_given=is_data_given,
        )
    except Exception as error:
        own = error
    # Imported here: it needs torch.
    from megallama.topology.rendezvous import hear, tell

    if environment.rank == 0:
        tell(own, environment=environment, job=job, patience_s=PATIENCE_S)
    else:
        hear(environment=environment, job=job, patience_s=None if own is None else PATIENCE_S)
    if own is not None:
        raise own


def _check_weights(config: RunConfig) -> list[str]:
    # Imported here: it needs torch, which a run that starts from random weights need not wait for.
    from megallama.trainer.init_from import source_problems

    path = str(config.train.init_from)
    own = Path(config.train.run_dir) / "checkpoints"
    return source_problems(Path(path), model=config.model, own=own)
