"""Checks the arguments of the command line (`optim.lr=1e-4 +exp=demo`) and converts them to Hydra's form.

Checking before Hydra does lets every mistake be named at once and in our own words.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from megallama.config.names import GROUPS, field_types, setting_keys, unknown_key, unknown_name
from megallama.config.schema import RunConfig

# What may stand unquoted in a value, with whole interpolations; Hydra's grammar knows only ASCII in it.
_RUN = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|(?:\$\{[^}]*\}|[^,\[\]{}():'"])+""")


class HydraUse(Enum):
    """Which of Hydra's own settings have an effect on what is started. The others are refused by name."""

    run = "run"
    """One run: its folder and where its files are searched."""
    jobs = "jobs"
    """Several runs, one after another on the same ranks, which torchrun started."""
    sweep = "sweep"
    """Hydra's own sweeper and launcher start the runs."""
    shown = "shown"
    """Nothing is started: Hydra shows what the words amount to."""


_NUMBER_OF_JOB = ("hydra.job.num", "hydra.job.id")
_EFFECTIVE = {
    HydraUse.run: ("hydra.run.dir", "hydra.searchpath", *_NUMBER_OF_JOB),
    HydraUse.jobs: ("hydra.sweep.dir", "hydra.sweep.subdir", "hydra.searchpath"),
}
_BASIC = ("hydra/launcher=basic", "hydra/sweeper=basic")
_HYDRA_REMEDY = {
    HydraUse.run: "leave it out, or start a sweep of runs with megallama train --multirun",
    HydraUse.jobs: "leave it out, or start the sweep with megallama train --multirun on one machine",
}


@dataclasses.dataclass(frozen=True)
class ParsedOverrides:
    """What a command line asks for."""

    overrides: list[Override]
    """The words that could be understood, in Hydra's form."""
    problems: list[str]
    """One message for each word that could not."""


def parse_overrides(
    words: Sequence[str],
    *,
    group_options: Callable[[str], Sequence[str]],
    use: HydraUse,
    loader: ConfigLoader | None = None,
) -> ParsedOverrides:
    """The overrides in `words`, and everything that is wrong with them.

    Args:
        words: As typed, e.g. "optim.lr=1e-4".
        group_options: Names of the files in a group of `conf/`.
        use: What is started: whether a word may hold several values, and which of Hydra's settings count.
        loader: Hydra's, which expands "model=glob(llama*)".
    """
    parser = OverridesParser.create(loader)
    result = ParsedOverrides([], [])
    for word in words:
        try:
            (override,) = parser.parse_overrides([_for_hydra(word)])
        except HydraException:
            result.problems.append(
                f"override {word!r} cannot be read: write section.setting=value, and quote a value with"
                " special characters twice, as in \"train.run_dir='a, b'\""
            )
            continue
        if not override.key_or_group:
            result.problems.append(f"override {word!r} names no setting: write section.setting=value")
            continue
        problem = _problem(override, word=word, group_options=group_options, use=use)
        if problem:
            result.problems.append(problem)
        else:
            result.overrides.append(override)
    return result


def _for_hydra(word: str) -> str:
    """`word` with its group prefix mended and text outside ASCII quoted, as Hydra's grammar asks."""
    key, equals, value = word.partition("=")
    bare = key.lstrip("+")
    # conf/config.yaml lists `model` but not `exp`: Hydra wants "model=" and "+exp="; a user need not know.
    if bare in GROUPS:
        key = "+exp" if bare == "exp" else bare
    if value.isascii():
        return f"{key}{equals}{value}"
    return f"{key}{equals}{_RUN.sub(_quote_non_ascii, value)}"


def _quote_non_ascii(match: re.Match[str]) -> str:
    text = match.group()
    if text.isascii() or text[0] in "'\"":
        return text
    inner = text.strip()
    before, _, after = text.partition(inner)
    return f"{before}'{inner}'{after}"


def _problem(
    override: Override, *, word: str, group_options: Callable[[str], Sequence[str]], use: HydraUse
) -> str | None:
    key = override.key_or_group
    if override.is_hydra_override():
        return _hydra_problem(override, word=word, use=use)
    if override.is_delete():
        return f"{word}: a setting cannot be removed; give it another value, or null where that is allowed"
    if override.is_sweep_override() and use is HydraUse.run:
        return f"{word} names several values: add --multirun to run them one after another, or choose one"
    if key in GROUPS:
        return _group_problem(override, group_options=group_options)
    if re.match(r"data\.(sources|validation)[.\[]", key):
        whole = key[: key.index(".") + 1] + re.split(r"[.\[]", key)[1]
        example = f"{whole}='[{{path: a, weight: 2}}, {{path: b}}]'"
        return f"{key} is a part of a list: give the list whole, as in {example}"
    if key not in field_types(RunConfig) and key not in setting_keys():
        return unknown_key(key)
    value = None if override.is_sweep_override() else override.value()
    wrong = [f"{key}.{name}" for name in value] if isinstance(value, dict) else []
    wrong = [name for name in wrong if name not in setting_keys()]
    if wrong:
        return unknown_key(wrong[0])
    if override.is_add():
        return f"{word}: {key} exists already: write it without +"
    return None


def _hydra_problem(override: Override, *, word: str, use: HydraUse) -> str | None:
    key = override.key_or_group
    if use is HydraUse.sweep:
        if key == "hydra.run.dir":
            return (
                f"{word}: the runs of a sweep have folders of their own: set hydra.sweep.dir or train.run_dir"
            )
        if key == "hydra.job.chdir" and override.value() is not False:
            return f"{word}: relative paths start at the folder of the command: leave it out"
        if key == "hydra.mode":
            return f"{word}: --multirun says it already: leave it out"
    if use not in _EFFECTIVE or key in _EFFECTIVE[use] or (use is HydraUse.jobs and word in _BASIC):
        return None
    what = "one run" if use is HydraUse.run else "runs one after another on the same ranks"
    return f"{word} would change nothing here, for {what}: {_HYDRA_REMEDY[use]}"


def _group_problem(override: Override, *, group_options: Callable[[str], Sequence[str]]) -> str | None:
    group = override.key_or_group
    available = group_options(group)
    if override.is_sweep_override():
        elements = override.sweep_string_iterator() if override.is_discrete_sweep() else iter(())
        names: list[Any] = [element.strip("'\"") for element in elements]  # quoted where it is not ASCII
    else:
        value = override.value()
        names = list(value) if isinstance(value, list) else [value]
    wrong = [str(name) for name in names if str(name) not in available]
    return unknown_name(wrong[0], group=group, available=available) if wrong else None
