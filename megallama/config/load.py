"""Builds the frozen `RunConfig` from `conf/` and the command line; reads and writes the `config.yaml` of a run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from megallama.config.names import field_types, listing
from megallama.config.schema import ModelConfig, RunConfig, SourceConfig
from megallama.config.typed import Problems, build, defaults, plain, type_name
from megallama.config.words.overrides import HydraUse, parse_overrides
from megallama.host.errors import ConfigError

T = TypeVar("T")

_PACKAGE = Path(__file__).resolve().parents[1]

CONF_DIR = (_PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent) / "conf"
"""The configuration files that are shipped: inside an installed package, else at the top level of the repository."""

ROOT = "config"
"""Name of the file in `conf/` where composition begins."""

# Plain values, not the dataclasses: Hydra cannot override in frozen ones, and `typed` checks the types.
ConfigStore.instance().store(name="schema", node=defaults(RunConfig))


def load_config(
    overrides: Sequence[str],
    *,
    conf_dir: Path = CONF_DIR,
    extra_conf_dir: Path | None = None,
    working_dir: Path | None = None,
    use: HydraUse = HydraUse.run,
    job: int = 0,
) -> RunConfig:
    """The run that `overrides` describe.

    Args:
        overrides: Words of a command line, e.g. ["+exp=llama2_7b", "parallel.tp=8"].
        conf_dir: Folder with config.yaml, model/ and exp/.
        extra_conf_dir: A user's own folder with model/ or exp/ files, searched as well.
        working_dir: Folder that relative paths start from; default: the current one.
        use: What is started: one run, or several, each of which has a folder of its own.
        job: Number of the run among several.

    Raises:
        ConfigError: unknown keys or names, wrong types, missing values; all that were found.
    """
    base = (working_dir or Path.cwd()).absolute()
    with open_hydra(conf_dir):
        options = options_with([*overrides, *search_path(extra_conf_dir)])
        parsed = parse_overrides(overrides, group_options=options, use=use)
        parsed.problems.extend(_ambiguous(parsed.overrides, conf_dir=conf_dir, extra_conf_dir=extra_conf_dir))
        words = [str(override.input_line) for override in parsed.overrides]
        values = _compose(words + search_path(extra_conf_dir), use=use, job=job, problems=parsed.problems)
        problems = Problems(list(parsed.problems))
        config = build(RunConfig, values, problems=problems, origin=_origin(parsed.overrides))
        # A name that does not exist leaves everything empty that its file would have set.
        is_base_known = not any(problem.startswith(("model=", "exp=")) for problem in parsed.problems)
        missing = (
            _missing(problems.missing, models=options("model"), exps=options("exp")) if is_base_known else []
        )
    messages = problems.messages + missing
    if messages or config is None:
        raise ConfigError(messages)
    return with_absolute_paths(config, base=base)


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML; `load_yaml` reads it back exactly."""
    return str(yaml.dump(plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000))


def model_to_yaml(model: ModelConfig) -> str:
    """A shape as a file of `conf/model/`: what differs from the defaults."""
    usual = defaults(ModelConfig)
    settings = {key: value for key, value in plain(model).items() if value != usual[key]}
    return str(yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000))


def is_shipped_otherwise(name: str, file: Path | ModelConfig, *, conf_dir: Path = CONF_DIR) -> bool:
    """Whether `conf/model/` has a shape of this name and it is not the one of `file`.

    Hydra takes the repository's file wherever a name stands in both folders.
    """
    shipped = conf_dir / "model" / f"{name}.yaml"
    if not shipped.is_file():
        return False
    try:
        own = file if isinstance(file, ModelConfig) else load_model_yaml(file)
    except ConfigError:
        return True
    return dataclasses.replace(own, name=name) != dataclasses.replace(load_model_yaml(shipped), name=name)


class _Dumper(yaml.SafeDumper):
    """PyYAML 6.0 writes Unicode's own line ends plainly and reads them back as spaces; quoted, it escapes them."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if any(mark in data for mark in "\x85\u2028\u2029\ufeff") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


def load_yaml(path: str | Path) -> RunConfig:
    """The configuration in a file that `to_yaml` made. Settings that it lacks take their defaults.

    Raises:
        ConfigError: the file cannot be read, or holds unknown settings or wrong values.
    """
    return _load_as(RunConfig, path, key="")


def load_model_yaml(path: str | Path) -> ModelConfig:
    """The shape in a file of `conf/model/`, or one that `model_to_yaml` made.

    Raises:
        ConfigError: as `load_yaml`.
    """
    return _load_as(ModelConfig, path, key="model")


def _load_as(cls: type[T], path: str | Path, *, key: str) -> T:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            [f"configuration {path} cannot be read ({reason}): restore it or use another folder"]
        ) from error
    if not isinstance(values, dict):
        raise ConfigError([f"configuration {path} holds no settings: restore it or use another folder"])
    problems = Problems()
    config = build(cls, values, problems=problems, key=key, origin=str(path))
    messages = problems.messages + [f"{name} is missing in {path}: add it" for name in problems.missing]
    if messages or config is None:
        raise ConfigError(messages)
    return config


def with_absolute_paths(config: RunConfig, *, base: Path) -> RunConfig:
    """`config` with every path of the user's made absolute; relative ones start at `base`."""

    def absolute(path: str) -> str:
        return os.path.normpath(base / Path(path).expanduser()) if path else path

    def sources(data: list[SourceConfig]) -> list[SourceConfig]:
        return [dataclasses.replace(source, path=absolute(source.path)) for source in data]

    tokenizer = config.data.tokenizer
    data = dataclasses.replace(
        config.data,
        sources=sources(config.data.sources),
        schedule=[dataclasses.replace(mix, sources=sources(mix.sources)) for mix in config.data.schedule],
        validation=sources(config.data.validation),
        tokenizer=absolute(tokenizer) if tokenizer else tokenizer,
    )
    weights = config.train.init_from
    train = dataclasses.replace(
        config.train,
        run_dir=absolute(config.train.run_dir),
        init_from=absolute(weights) if weights else weights,
    )
    return dataclasses.replace(config, data=data, train=train)


@contextmanager
def open_hydra(conf_dir: Path) -> Iterator[None]:
    """Hydra with the files of `conf_dir`, for the block."""
    if not (conf_dir / f"{ROOT}.yaml").is_file():
        raise ConfigError(
            [f"configuration folder {conf_dir} has no {ROOT}.yaml: name the repository's conf/ folder"]
        )
    # A job of a sweep runs inside of Hydra, of which there is one in a process.
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(conf_dir), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = outer


def _compose(words: list[str], *, use: HydraUse, job: int, problems: list[str]) -> Any:
    """Plain values of the composed tree; what Hydra cannot do is added to `problems`."""
    is_job = use is not HydraUse.run
    numbered = [f"hydra.job.num={job}", f"hydra.job.id='{job}'"] if is_job else []
    before = HydraConfig.instance().cfg
    try:
        composed = compose(ROOT, overrides=words + numbered, return_hydra_config=True)
        HydraConfig.instance().set_config(composed)
        folder = _run_folder(composed.hydra, is_job=is_job)
        values: dict[Any, Any] = {
            key: OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
            for key, node in composed.items()
            if key != "hydra"
        }
    except (HydraException, OmegaConfBaseException) as error:
        problems.append(
            f"the configuration cannot be composed ({' '.join(str(error).split())}): correct what it names"
        )
        raise ConfigError(problems) from error
    finally:
        HydraConfig.instance().cfg = before
    if folder and isinstance(values.get("train"), dict):
        values["train"]["run_dir"] = folder
    return values


def _run_folder(hydra: DictConfig, *, is_job: bool) -> str:
    """The run's folder as Hydra names it; empty where it cannot be told."""
    try:
        if not is_job:
            return str(hydra.run.dir)
        return os.path.join(str(hydra.sweep.dir), str(hydra.sweep.subdir))
    except (MissingMandatoryValue, InterpolationToMissingValueError):
        return ""


def _ambiguous(
    overrides: Sequence[Override], *, conf_dir: Path, extra_conf_dir: Path | None
) -> Iterator[str]:
    """Names that mean something else in the user's folder than in the repository's."""
    for override in overrides if extra_conf_dir else ():
        group, name = override.key_or_group, override.value()
        own = Path(str(extra_conf_dir), group, f"{name}.yaml")
        shipped = conf_dir / group / own.name
        if group not in ("model", "exp") or not own.is_file() or not shipped.is_file():
            continue
        if group == "model" and not is_shipped_otherwise(str(name), own, conf_dir=conf_dir):
            continue
        yield f"{group}={name} is both in {own.parent} and in {shipped.parent}: rename {own} and give its new name"


def search_path(extra_conf_dir: Path | None) -> list[str]:
    """The word that makes Hydra search a user's own folder too."""
    if extra_conf_dir is None:
        return []
    quoted = str(extra_conf_dir.absolute()).replace("\\", "\\\\").replace("'", "\\'")
    return [f"hydra.searchpath=['file://{quoted}']"]


def options_with(words: Sequence[str]) -> Callable[[str], list[str]]:
    """Names of the files in a group of the open `conf/`, and of the folders that `words` make Hydra search."""
    loader = GlobalHydra.instance().config_loader()
    places = [word for word in words if word.startswith("hydra.searchpath=")]

    def options(group: str) -> list[str]:
        if places:
            # What is wrong with the words is told where they are read.
            with suppress(HydraException):
                return sorted(loader.get_group_options(group, ObjectType.CONFIG, ROOT, places))
        return sorted(loader.get_group_options(group, ObjectType.CONFIG))

    return options


def _origin(overrides: Sequence[Override]) -> str:
    """The files that an unknown key can come from, since those of the command line were checked before."""
    picked = [
        f"conf/{o.key_or_group}/{o.value()}.yaml" for o in overrides if o.key_or_group in ("model", "exp")
    ]
    return " or ".join(picked) or f"conf/{ROOT}.yaml"


def _missing(keys: list[str], *, models: list[str], exps: list[str]) -> list[str]:
    """One message for all mandatory settings that have no value, and one for each part of a list."""
    in_lists = [key for key in keys if key.count(".") > 1]
    messages = [f"{key} has no value: give every source a path" for key in in_lists]
    keys = [key for key in keys if key not in in_lists]
    if not keys:
        return messages
    mandatory = [f"model.{name}" for name, value in defaults(RunConfig)["model"].items() if value == "???"]
    if set(mandatory) <= set(keys):
        keys = ["model", *(key for key in keys if key not in mandatory)]
    examples = []
    if "model" in keys:
        examples.append(f"model=<name> ({listing(models)})")
    examples += [f"{key}=<{_placeholder(key)}>" for key in keys if key != "model"]
    return messages + [
        f"{', '.join(keys)} {'has' if len(keys) == 1 else 'have'} no value: add {' '.join(examples)},"
        f" or start from a complete run with +exp=<name> ({listing(exps)})"
    ]


def _placeholder(key: str) -> str:
    section, _, name = key.partition(".")
    return type_name(field_types(field_types(RunConfig)[section])[name])
