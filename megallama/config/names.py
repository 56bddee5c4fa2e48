"""The dotted keys of all settings, and suggestions for a mistyped key."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from megallama.config.schema import RunConfig

GROUPS = ("model", "exp")
"""Folders of `conf/` whose files are picked by name."""

RUN_FILE = "config.yaml"
"""The configuration of a run, in its folder."""

DERIVED = {
    "parallel.dp": "dp is what remains of the ranks: world_size / (tp x pp x cp)",
    "train.num_micro_batches": "it is train.global_batch_size / (train.micro_batch_size x dp)",
}
"""Quantities that users look for among the settings and that follow from others."""


def field_types(cls: type[Any]) -> dict[str, Any]:
    """Resolved annotation of every field of a schema class, in order of declaration."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def setting_keys() -> tuple[str, ...]:
    """Dotted key of every setting of a run: "model.name", ..., "log.wandb_project"."""
    return tuple(
        f"{section}.{name}"
        for section, section_type in field_types(RunConfig).items()
        for name in field_types(section_type)
    )


def unknown_key(key: str, *, origin: str = "") -> str:
    """The message for a key that no setting has, naming the nearest one.

    Args:
        key: Dotted key as the user wrote it.
        origin: Where it was found, for keys that were not typed on the command line.
    """
    found = f" (in {origin})" if origin else ""
    if key in DERIVED:
        return f"{key} is not a setting{found}: {DERIVED[key]}"
    near = nearest_key(key)
    if near is not None:
        return f"{key} is not a setting{found}: did you mean {near}?"
    section = key.split(".")[0]
    sections = field_types(RunConfig)
    if section in sections:
        return f"{key} is not a setting{found}: {section} has {', '.join(field_types(sections[section]))}"
    return f"{key} is not a setting{found}: the sections are {', '.join(sections)}"


def unknown_part(key: str, name: str, *, names: Iterable[str]) -> str:
    """The message for a name that the part `key` of a list does not have."""
    known = list(names)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{key}.{name} is not a setting: {hint}it has {', '.join(known)}"


def nearest_key(key: str) -> str | None:
    """The setting, section or group that `key` was most likely meant to be; None when nothing is near."""
    keys = setting_keys()
    leaf = key.rsplit(".", 1)[-1]
    # "train.lr" and plain "lr" are optim.lr in the wrong place, however far apart the whole strings are.
    moved = [known for known in keys if known.rsplit(".", 1)[-1] == leaf]
    if moved:
        return difflib.get_close_matches(key, moved, n=1, cutoff=0.0)[0]
    section = key.split(".")[0]
    same_section = [known for known in keys if known.startswith(f"{section}.")]
    if "." in key and same_section:
        near = difflib.get_close_matches(leaf, [known.split(".")[1] for known in same_section], n=1)
        if near:
            return f"{section}.{near[0]}"
    if "." not in key:
        keys = (*GROUPS, *field_types(RunConfig), *keys)
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
    return near[0] if near else None


def unknown_name(name: str, *, group: str, available: Sequence[str]) -> str:
    """The message for a file that `conf/<group>/` does not hold, with the nearest and all names."""
    near = difflib.get_close_matches(name, available, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{group}={name} does not exist: {hint}available: {listing(available)}"


def listing(names: Iterable[str]) -> str:
    """Names as a comma-separated list; "none" when there are none."""
    return ", ".join(sorted(names)) or "none"
