"""The runs of `--multirun`: listed for ranks that take them in turn, or started by Hydra's own plugins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megallama.compat.hydra import split_sweep
from megallama.config.load import CONF_DIR, ROOT, open_hydra, options_with, search_path
from megallama.config.words.overrides import HydraUse, parse_overrides
from megallama.host.errors import ConfigError

Job = Callable[[list[str]], float | None]
"""Does the run of these words and returns what a sweeper may minimise. It is pickled by some launchers."""

RUNS_PER_TASK = ("nodes", "tasks_per_node")
"""Settings of submitit's launchers that would start a job several times over."""


def hydra_words(
    overrides: Sequence[str],
    *,
    conf_dir: Path = CONF_DIR,
    extra_conf_dir: Path | None = None,
    use: HydraUse = HydraUse.shown,
) -> list[str]:
    """`overrides` in the form that Hydra itself understands, sweeps included.

    Raises:
        ConfigError: words that cannot be understood, or that would change nothing for `use`.
    """
    with open_hydra(conf_dir):
        loader = GlobalHydra.instance().config_loader()
        options = options_with([*overrides, *search_path(extra_conf_dir)])
        parsed = parse_overrides(overrides, group_options=options, use=use, loader=loader)
    if parsed.problems:
        raise ConfigError(parsed.problems)
    return [str(override.input_line) for override in parsed.overrides]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The runs of a command line; its words are known to be understood."""

    words: list[str]
    """In Hydra's form."""
    jobs: list[list[str]]
    """The words of each run, as far as they are known before. Of a sweeper that chooses values as it goes there is one,
    with the first value of each list and the lower end of each range."""
    is_chosen: bool
    """Whether the sweeper chooses values by what the runs return."""
    launcher: str
    """Which plugin starts the runs; "basic": one after another, from this process."""
    runs_at_once: int
    """Most runs that it starts at the same time on this machine; below 0: as many as there are cores."""


def load_sweep(
    overrides: Sequence[str],
    *,
    use: HydraUse = HydraUse.sweep,
    conf_dir: Path = CONF_DIR,
    extra_conf_dir: Path | None = None,
) -> Sweep:
    """The sweep that `overrides` describe, for Hydra's own plugins or for the same ranks one run after another.

    Raises:
        ConfigError: a word cannot be understood or expanded, or a launcher cannot start the runs as they are.
    """
    words = hydra_words(overrides, conf_dir=conf_dir, extra_conf_dir=extra_conf_dir, use=use)
    words += search_path(extra_conf_dir)
    with open_hydra(conf_dir):
        every = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(words)
        # The last word of a setting counts. Optuna's sweeper would pass on all of them, in an order of its own.
        parsed = list({override.key_or_group: override for override in every}.values())
        first = [_first_value(override) for override in parsed]
        try:
            hydra = compose(ROOT, overrides=first, return_hydra_config=True).hydra
            chosen, launcher = hydra.runtime.choices, OmegaConf.to_container(hydra.launcher)
        except (
            HydraException,
            OmegaConfBaseException,
            AttributeError,
        ) as error:  # the last of a section that is null
            raise ConfigError(
                [f"the sweep cannot be composed ({' '.join(str(error).split())}): correct what it names"]
            ) from error
        is_chosen = chosen["hydra/sweeper"] != "basic"
        try:
            jobs = [first] if is_chosen else split_sweep(parsed)
        except HydraException as error:
            raise ConfigError(
                [f"the sweep cannot be expanded ({error}): list the values, as in optim.lr=1e-4,3e-4"]
            ) from error
    problems = [*_plugin_problems(chosen, use), *_launcher_problems(launcher)]
    if problems:
        raise ConfigError(problems)
    words = [str(override.input_line) for override in parsed]
    assert isinstance(launcher, dict)
    at_once = launcher.get("n_jobs", 1)
    return Sweep(
        words,
        jobs,
        is_chosen=is_chosen,
        launcher=str(chosen["hydra/launcher"]),
        runs_at_once=at_once if isinstance(at_once, int) else 1,
    )


def _plugin_problems(chosen: Any, use: HydraUse) -> Iterator[str]:
    """Plugins that a file of the user's names; those on the command line are told before."""
    for group in ("hydra/launcher", "hydra/sweeper") if use is HydraUse.jobs else ():
        if chosen[group] != "basic":
            yield (
                f"{group}={chosen[group]} cannot start runs from within the ranks: start the sweep with"
                " megallama train --multirun on one machine"
            )


def _launcher_problems(launcher: Any) -> Iterator[str]:
    for key in RUNS_PER_TASK:
        if launcher.get(key, 1) not in (1, None):
            yield (
                f"hydra.launcher.{key} ({launcher[key]}) would start each run {launcher[key]} times, and a run starts"
                f" its own ranks, on one machine: set hydra.launcher.{key}=1"
            )


def run_sweep(sweep: Sweep, job: Job, *, conf_dir: Path = CONF_DIR) -> None:
    """Let Hydra's sweeper and launcher do the runs; what a job raises ends the sweep and comes out here."""
    with open_hydra(conf_dir):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        hydra.multirun(config_name=ROOT, task_function=_Task(job), overrides=sweep.words)


@dataclasses.dataclass(frozen=True)
class _Task:
    """What Hydra's launchers call, in whatever process or machine."""

    job: Job

    def __call__(self, settings: DictConfig) -> float | None:
        hydra: Any = HydraConfig.get()
        folder = str(hydra.runtime.output_dir).replace("\\", "\\\\").replace("'", "\\'")
        words = [str(word) for word in hydra.overrides.task]
        words += [f"hydra.run.dir='{folder}'", f"hydra.job.num={hydra.job.num}"]
        words += [word for word in hydra.overrides.hydra if str(word).startswith("hydra.searchpath=")]
        return self.job(words)


def _first_value(override: Override) -> str:
    if not override.is_sweep_override():
        return str(override.input_line)
    value = override.value()
    if isinstance(value, IntervalSweep):
        return f"{override.get_key_element()}={value.start}"
    return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
