"""The layouts to verify: those written by the user, or all legal ones for a model and a number of ranks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from megallama.config.check import check
from megallama.config.names import field_types
from megallama.config.schema import KernelConfig, ParallelConfig, RunConfig
from megallama.config.typed import Problems, build, plain
from megallama.host.errors import ConfigError, UserError

SHORT_NAMES = {
    "sp": "parallel.sequence_parallel",
    "zero": "zero.stage",
    "mbs": "train.micro_batch_size",
    "gbs": "train.global_batch_size",
    "recompute": "train.recompute",
    "ties": "model.tie_embeddings",
}
"""Beside the fields of `parallel`, which stand for themselves; any dotted key works too."""

SIZES = ("tp", "cp", "pp", "dp")
"""Axes whose sizes multiply to the number of ranks."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to cut a run over ranks."""

    name: str
    """As the user writes it: "tp=2,pp=2,dp=2,zero=2"."""
    dp: int
    """Data-parallel size."""
    settings: tuple[tuple[str, Any], ...]
    """Dotted key and value of every setting in which the run differs from the experiment's."""

    def apply(self, config: RunConfig) -> RunConfig:
        """`config` cut this way; sizes that the layout does not name are 1.

        Raises:
            ConfigError: unknown keys or values of a wrong type.
        """
        start = {f"parallel.{k}": v for k, v in plain(ParallelConfig()).items() if not isinstance(v, str)}
        return change(config, {**start, **dict(self.settings)})

    def world_size(self, config: RunConfig) -> int:
        """Ranks of the layout, where `config` is cut this way."""
        parallel = config.parallel
        return parallel.tp * parallel.cp * parallel.pp * self.dp


def change(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """`config` with other values at dotted keys, checked for their types.

    Raises:
        ConfigError: unknown keys or values of a wrong type.
    """
    tree = plain(config)
    for key, value in settings.items():
        section, _, name = key.partition(".")
        if not isinstance(tree.get(section), dict) or not name:
            raise ConfigError([f"{key} is no setting: write it as section.name, as in parallel.tp"])
        tree[section][name] = value
    problems = Problems()
    changed = build(RunConfig, tree, problems=problems)
    if problems.messages or changed is None:
        raise ConfigError(problems.messages)
    return changed


def parse_layouts(text: str) -> list[Layout]:
    """Layouts of "tp=2,pp=2;dp=4,zero=2": a semicolon between two, commas within.

    Raises:
        UserError: a word is no `name=value`.
    """
    layouts = [_parse(part.strip()) for part in text.split(";") if part.strip()]
    if not layouts:
        raise UserError(f"--layouts ({text!r}) names none: write for example tp=2,pp=2;dp=4,zero=2")
    return layouts


def _parse(text: str) -> Layout:
    dp, settings = 1, {}
    for word in _split(text):
        name, equals, value = word.strip().partition("=")
        if not equals or not value:
            raise UserError(f"layout {text!r}: {word!r} is no name=value; write for example tp=2,zero=2")
        if name == "dp":
            if not value.isdecimal() or int(value) < 1:
                raise UserError(f"layout {text!r}: dp ({value}) must be a positive integer")
            dp = int(value)
            continue
        key = SHORT_NAMES.get(name, name if "." in name else f"parallel.{name}")
        is_list = value.startswith("[")
        settings[key] = [v for v in value.strip("[]").split(",") if v] if is_list else value
    return Layout(text, dp, tuple(settings.items()))


def _split(text: str) -> Iterator[str]:
    """At commas outside of brackets."""
    depth, word = 0, ""
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            yield word
            word = ""
        else:
            word += letter
    yield word


def problems_of(config: RunConfig, *, world_size: int) -> list[str]:
    """What the real check says of a run, its data and folders left aside."""
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, sources=[], schedule=[], validation=[], tokenizer=None),
        train=dataclasses.replace(config.train, run_dir=".", init_from=None),
        # Whether apex is installed here says nothing about the layout.
        kernels=KernelConfig(attention=config.kernels.attention),
    )
    found = check(
        config,
        world_size=world_size,
        check_token_file=lambda path: [],
        read_manifest=lambda path: None,
        load_tokenizer=_no_tokenizer,
    )
    return [problem for problem in found if not problem.startswith("data.")]


def _no_tokenizer(path: str) -> Any:
    raise AssertionError(path)


def legal_layouts(
    config: RunConfig, *, max_ranks: int, further: Mapping[str, Sequence[Any]] | None = None
) -> list[Layout]:
    """Every layout of up to `max_ranks` ranks that the check accepts for `config`.

    The axes of `parallel` come from the schema: sizes take powers of two, flags both values, kinds all.

    Args:
        config: The run; batch sizes are not asked to fit, `shrink` makes them.
        max_ranks: Most ranks.
        further: Further dotted keys with the values to combine.
    """
    options: dict[str, list[Any]] = {}
    for field in dataclasses.fields(ParallelConfig):
        annotation = field_types(ParallelConfig)[field.name]
        if field.name in SIZES:
            continue
        if annotation is int:
            options[f"parallel.{field.name}"] = [1, 2]
        elif annotation is bool:
            options[f"parallel.{field.name}"] = [False, True]
        elif isinstance(annotation, type) and issubclass(annotation, Enum):
            options[f"parallel.{field.name}"] = [member.value for member in annotation]
    options["zero.stage"] = [0, 1, 2, 3]
    options |= {key: list(values) for key, values in (further or {}).items()}
    layouts = []
    for sizes in _sizes(max_ranks):
        for values in itertools.product(*options.values()):
            settings = dict(zip(options, values, strict=True))
            layout = _layout(sizes, settings)
            if not _says_nothing_new(sizes, settings) and _is_legal(config, layout):
                layouts.append(layout)
    return layouts


def _sizes(max_ranks: int) -> Iterator[dict[str, int]]:
    powers = [2**k for k in range(max_ranks.bit_length())]
    for values in itertools.product(powers, repeat=len(SIZES)):
        sizes = dict(zip(SIZES, values, strict=True))
        ranks = sizes["tp"] * sizes["cp"] * sizes["pp"] * sizes["dp"]
        if ranks <= max_ranks:
            yield sizes


def _layout(sizes: Mapping[str, int], settings: Mapping[str, Any]) -> Layout:
    default = {f"parallel.{k}": v for k, v in plain(ParallelConfig()).items()} | {"zero.stage": 1}
    words = {f"parallel.{k}": v for k, v in sizes.items() if k != "dp" and v > 1}
    words |= {k: v for k, v in settings.items() if default.get(k) != v}
    short = {key: name for name, key in SHORT_NAMES.items()}
    shown = [f"{short.get(k, k.removeprefix('parallel.'))}={str(v).lower()}" for k, v in words.items()]
    shown += [f"dp={sizes['dp']}"] if sizes["dp"] > 1 else []
    words.setdefault("zero.stage", 1)
    return Layout(",".join(shown) or "dp=1", sizes["dp"], tuple(words.items()))


def _says_nothing_new(sizes: Mapping[str, int], settings: Mapping[str, Any]) -> bool:
    """Whether another combination computes the very same: a kind of an axis of size 1, ZeRO 0 of one replica."""
    if sizes["cp"] == 1 and any(
        k.startswith("parallel.cp_") and v != plain(ParallelConfig())[k.removeprefix("parallel.")]
        for k, v in settings.items()
    ):
        return True
    return sizes["dp"] * sizes["cp"] == 1 and settings["zero.stage"] == 0


def _is_legal(config: RunConfig, layout: Layout) -> bool:
    cut = layout.apply(config)
    world_size = layout.world_size(cut)
    # The batch follows from the layout when the model is shrunk; here any that fits will do.
    batch = cut.train.micro_batch_size * layout.dp * max(2, 2 * cut.parallel.pp)
    cut = dataclasses.replace(cut, train=dataclasses.replace(cut.train, global_batch_size=batch))
    return not problems_of(cut, world_size=world_size)
