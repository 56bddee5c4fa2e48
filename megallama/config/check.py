"""All rules that a run must satisfy, checked together before anything is started or written.

One small function a rule; each yields its messages. The user sees all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from megallama.config import check_files, check_layout, check_values
from megallama.config.check_files import ManifestLike, Probes, TokenizerLike
from megallama.config.schema import ModelConfig, RunConfig
from megallama.host.errors import ConfigError

Rule = Callable[[RunConfig], Iterator[str]]

VALUE_RULES: tuple[Rule, ...] = (
    check_values.check_ranges,
    check_values.check_integers_fit,
    check_values.check_numbers_are_finite,
    check_values.check_ratios,
    check_values.check_loss_scale,
    check_values.check_schedule,
    check_values.check_partial,
    check_values.check_keep_every,
    check_values.check_rope,
    check_values.check_seq_len,
    check_layout.check_combinations,
    check_layout.check_recompute,
    check_layout.check_offload,
    check_layout.check_apex,
    check_files.check_data_schedule,
    check_layout.check_accumulation,
    check_layout.check_transformer_engine,
)

DIVIDING_RULES: tuple[Rule, ...] = (
    check_values.check_heads,
    check_layout.check_heads_over_tp,
    check_layout.check_widths_over_tp,
    check_layout.check_layers_over_pp,
    check_layout.check_sequence_parallel,
    check_layout.check_context_parallel,
)
"""Rules that need positive sizes."""

FOLDER_RULES: tuple[Rule, ...] = (check_files.check_run_dir, check_files.check_same_model)


def check_settings(
    config: RunConfig,
    *,
    world_size: int | None,
    parameter_names: Callable[[ModelConfig], Iterable[str]] | None = None,
) -> list[str]:
    """The problems of a run that its settings alone show; no file is opened. Arguments are those of `check`."""
    problems = list(check_values.check_sizes_are_positive(config))
    rules = VALUE_RULES
    has_sizes = not problems
    if has_sizes:
        problems += check_layout.check_world_size(config, world_size)
        problems += check_layout.check_batch(config, world_size)
        rules = DIVIDING_RULES + rules
    if world_size is not None:
        rules += (check_files.check_kernels,)
    for rule in rules:
        problems += rule(config)
    if has_sizes and parameter_names is not None and config.optim.partial_parameters:
        names = parameter_names(config.model)
        problems += check_values.check_partial_names(config.optim.partial_parameters, names)
    return problems


def check(
    config: RunConfig,
    *,
    world_size: int | None,
    check_token_file: Callable[[str], list[str]],
    read_manifest: Callable[[str], ManifestLike | None],
    load_tokenizer: Callable[[str], TokenizerLike],
    parameter_names: Callable[[ModelConfig], Iterable[str]] | None = None,
    data_problems: Callable[[RunConfig], list[str]] = lambda _: [],
    check_weights: Callable[[RunConfig], list[str]] = lambda _: [],
    is_data_given: bool = False,
) -> list[str]:
    """All problems of a run, each `<What> (<values>): <what to change>`; none: it can start.

    Args:
        config: The run.
        world_size: Number of ranks. None leaves out what depends on it and on the machine of the ranks.
        check_token_file: Problems of the token file at a prefix.
        read_manifest: TokenManifest of the token file at a prefix, if it has one.
        load_tokenizer: The tokenizer in a file.
        parameter_names: Canonical names of the parameters of a model; None where names are not asked about.
        data_problems: Problems of mixing the sources, as long as sizes are positive.
        check_weights: Problems of `train.init_from`, where it is set.
        is_data_given: The caller trains on data of their own, so that `data.sources` may be empty.
    """
    probes = Probes(
        check_token_file=check_token_file, read_manifest=read_manifest, load_tokenizer=load_tokenizer
    )
    problems = check_settings(config, world_size=world_size, parameter_names=parameter_names)
    for rule in FOLDER_RULES:
        problems += rule(config)
    if not is_data_given:
        problems += check_files.check_data_is_named(config)
    problems += check_files.check_sources(config, probes)
    problems += check_files.check_vocabulary(config, probes)
    if not any(check_values.check_sizes_are_positive(config)):
        problems += data_problems(config)
    if config.train.init_from is not None:
        problems += check_weights(config)
    return problems


def check_config(
    config: RunConfig,
    *,
    world_size: int | None,
    check_token_file: Callable[[str], list[str]],
    read_manifest: Callable[[str], ManifestLike | None],
    load_tokenizer: Callable[[str], TokenizerLike],
    parameter_names: Callable[[ModelConfig], Iterable[str]] | None = None,
    data_problems: Callable[[RunConfig], list[str]] = lambda _: [],
    check_weights: Callable[[RunConfig], list[str]] = lambda _: [],
    is_data_given: bool = False,
) -> None:
    """Raise once with all problems that `check` finds.

    Raises:
        ConfigError: the run cannot start as it is.
    """
    problems = check(
        config,
        world_size=world_size,
        check_token_file=check_token_file,
        read_manifest=read_manifest,
        load_tokenizer=load_tokenizer,
        parameter_names=parameter_names,
        data_problems=data_problems,
        check_weights=check_weights,
        is_data_given=is_data_given,
    )
    if problems:
        raise ConfigError(problems)
