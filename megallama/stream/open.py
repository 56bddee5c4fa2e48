"""Opens the data of a run: its sources, the mixes and when they apply, and the validation data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from megallama.config.check_files import check_data_schedule, check_numbers
from megallama.config.schema import DataConfig, Packing, RunConfig, SourceConfig, TrainConfig
from megallama.host.errors import ConfigError, UserError
from megallama.stream.history import History, Mix
from megallama.stream.source import JoinedSource, TokenSource, cut_for_validation
from megallama.stream.stream import SampleStream, SourceShelf, build_mix
from megallama.stream.windows import Cutting
from megallama.tokens.manifest import check_token_file, content_identity, read_manifest, shard_prefixes
from megallama.tokens.token_file import TokenFile

T = TypeVar("T")

INDEX_FOLDER = "data-index"


@dataclass(frozen=True)
class RunData:
    """The opened data of a run."""

    shelf: SourceShelf
    plan: tuple[tuple[int, Mix], ...]
    """(step from which it holds, mix), in order, the first one from 0."""
    validation: SampleStream | None
    """What evaluation reads, from its first sample on."""
    eod_id: int | None
    """The end-of-document token, known where the loss leaves it out."""


def open_data(data: DataConfig, *, train: TrainConfig, vocab_size: int) -> RunData:
    """The data that `data` names, cut and drawn as `train` says, for a model of `vocab_size` token ids.

    Raises:
        ConfigError: missing or damaged files, a vocabulary larger than the model's, or sources that cannot be mixed;
            all of a kind at once.
    """
    problems = [problem for path in source_paths(data) for problem in check_token_file(path)]
    if problems:
        raise ConfigError(problems)
    files = {path: open_files(path) for path in source_paths(data)}
    for path, parts in files.items():
        _check_vocabulary(path, parts, vocab_size=vocab_size)
    return _open(data, train, files, index_folder=Path(train.run_dir) / INDEX_FOLDER)


def data_problems(config: RunConfig) -> list[str]:
    """What keeps the data of a run from being opened or from lasting; the rules are those of opening it.

    Indexes and manifests are looked at and no token is read, so it suits a login node. Sources that rules of their
    own refuse (files that are not whole, numbers out of range) are passed over. Where documents are cut, windows are
    not counted but bounded from above. How much a run that has checkpoints still needs is known when it reads one.
    """
    sound = _with_sound_sources(config.data)
    if not _is_mixable(sound.sources):
        return []
    files = {path: open_files(path) for path in source_paths(sound)}
    try:
        data = _open(sound, config.train, files, index_folder=None)
    except ConfigError as error:
        return list(error.problems)
    has_checkpoints = any((Path(config.train.run_dir) / "checkpoints").glob("*"))
    if sound != config.data or has_checkpoints or any(check_data_schedule(config)):
        return []
    batch = config.train.global_batch_size
    shortage = History().continued(0, global_batch_size=batch, plan=data.plan).shortage(config.train.steps)
    return [] if shortage is None else [shortage]


def source_paths(data: DataConfig) -> list[str]:
    """Every path that the data of a run is read from, each once."""
    return list(dict.fromkeys(entry.path for entry in data.all_sources()))


def _is_mixable(sources: Sequence[SourceConfig]) -> bool:
    return any(source.weight > 0 for source in sources)


def _with_sound_sources(data: DataConfig) -> DataConfig:
    """`data` without sources that rules of their own refuse, and without mixes of which nothing is left."""
    is_whole = {path: not check_token_file(path) for path in source_paths(data)}

    def sound(key: str, sources: Sequence[SourceConfig]) -> list[SourceConfig]:
        return [source for source in sources if is_whole[source.path] and _has_sound_numbers(key, source)]

    mixes = [
        replace(mix, sources=sound(f"data.schedule.{n}", mix.sources)) for n, mix in enumerate(data.schedule)
    ]
    return replace(
        data,
        sources=sound("data.sources", data.sources),
        schedule=[mix for mix in mixes if _is_mixable(mix.sources)],
        validation=sound("data.validation", data.validation),
    )


def _has_sound_numbers(key: str, source: SourceConfig) -> bool:
    numbers = (source.weight, source.validation_fraction, source.max_epochs or 0.0)
    return all(map(math.isfinite, numbers)) and not any(check_numbers(f"{key}.0", source))


def _open(
    data: DataConfig, train: TrainConfig, files: dict[str, list[TokenFile]], *, index_folder: Path | None
) -> RunData:
    problems: list[str] = []
    opened = _open_sources(data, files, problems=problems)
    eod_id = None if data.loss_on_eod else _tried(partial(_eod_id, files), problems=problems)
    shelf = SourceShelf(
        [source for pair in opened.values() for source in pair if source is not None],
        index_folder=index_folder,
    )
    cutting = Cutting(seq_len=train.seq_len, seed=train.seed, is_cut=data.packing is Packing.cut)
    planned = [(0, data.sources)]
    planned += [(entry.from_step, entry.sources) for entry in data.schedule]
    plan: list[tuple[int, Mix]] = []
    for step, sources in planned:
        entries = _train_entries(opened, sources)
        if sources and not entries:
            continue  # what is wrong with them is among the problems
        mix = _tried(partial(build_mix, shelf, entries, cutting=cutting), problems=problems)
        if mix is not None:
            plan.append((step, mix))
    build_validation = partial(
        _validation, data, shelf, opened, cutting=cutting, global_batch_size=train.global_batch_size
    )
    validation = _tried(build_validation, problems=problems)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return RunData(shelf=shelf, plan=tuple(plan), validation=validation, eod_id=eod_id)


def _tried(does: Callable[[], T], *, problems: list[str]) -> T | None:
    """What `does` gives; where it refuses, None, and what it says joins `problems`."""
    try:
        return does()
    except ConfigError as error:
        problems += error.problems
    except UserError as error:
        problems.append(str(error))
    return None


def open_files(path: str) -> list[TokenFile]:
    """The token files of a source, in order.

    Raises:
        ConfigError: missing or damaged ones.
    """
    return [TokenFile(prefix) for prefix in shard_prefixes(path)]


def _content(path: str) -> str | None:
    """What a source is known by: the same for shards and for one file."""
    manifest = read_manifest(path)
    return None if manifest is None else content_identity(manifest)


def open_past(history: History, *, index_folder: Path) -> SourceShelf:
    """All sources that a history names, as long as they are what they were.

    Raises:
        ConfigError: missing or damaged files.
        UserError: another content.
    """
    opened: dict[str, JoinedSource] = {}
    for segment in history.segments:
        for entry in segment.mix.sources:
            first, end = entry.span
            files, content = open_files(entry.path), _content(entry.path)
            source = JoinedSource(entry.path, files, first=first, end=end, content=content)
            if source.identity != entry.identity:
                raise UserError(
                    f"data source {entry.path} has changed since the run was trained on it: restore the files"
                    " of that time"
                )
            opened[entry.identity] = source
    return SourceShelf(list(opened.values()), index_folder=index_folder)


_Opened = dict[tuple[str, float], tuple[JoinedSource, JoinedSource | None]]
"""(path, validation fraction) -> (what is trained on, what is held out)."""


def _open_sources(data: DataConfig, files: dict[str, list[TokenFile]], *, problems: list[str]) -> _Opened:
    opened: _Opened = {}
    for path, fraction in dict.fromkeys(
        (entry.path, entry.validation_fraction) for entry in data.all_sources()
    ):
        whole = JoinedSource(path, files[path], content=_content(path))
        pair = _tried(partial(_cut, whole, files[path], fraction), problems=problems)
        if pair is not None:
            opened[path, fraction] = pair
    return opened


def _cut(
    whole: JoinedSource, files: Sequence[TokenFile], fraction: float
) -> tuple[JoinedSource, JoinedSource | None]:
    return cut_for_validation(whole, files, fraction) if fraction else (whole, None)


def _train_entries(
    opened: _Opened, sources: Sequence[SourceConfig]
) -> list[tuple[TokenSource, float, float | None]]:
    return [
        (opened[key][0], entry.weight, entry.max_epochs)
        for entry in sources
        if (key := (entry.path, entry.validation_fraction)) in opened
    ]


def _validation(
    data: DataConfig, shelf: SourceShelf, opened: _Opened, *, cutting: Cutting, global_batch_size: int
) -> SampleStream | None:
    """Validation data, and what sources hold out, in the order of the files."""
    entries: list[tuple[TokenSource, float, float | None]] = [
        (opened[entry.path, 0.0][0], entry.weight, None) for entry in data.validation if entry.weight
    ]
    for entry in data.sources:
        held_out = opened.get((entry.path, entry.validation_fraction), (None, None))[1]
        if held_out is not None and entry.weight:
            entries.append((held_out, entry.weight, None))
    if not entries:
        return None
    in_order = Cutting(cutting.seq_len, cutting.seed, is_cut=cutting.is_cut, is_shuffled=False)
    mix = build_mix(shelf, entries, cutting=in_order)
    history = History().continued(0, global_batch_size=global_batch_size, plan=[(0, mix)])
    return SampleStream(history, shelf)


def _check_vocabulary(path: str, files: Sequence[TokenFile], *, vocab_size: int) -> None:
    for file in files:
        if file.manifest is not None and file.manifest.vocab_size > vocab_size:
            raise ConfigError(
                [
                    f"data source {path} has {file.manifest.vocab_size} token ids, model.vocab_size"
                    f" ({vocab_size}) holds fewer: prepare it with the model's tokenizer"
                ]
            )


def _eod_id(files: dict[str, list[TokenFile]]) -> int:
    found: dict[int, str] = {}
    for path, parts in files.items():
        for file in parts:
            if file.manifest is None:
                raise UserError(
                    f"data.loss_on_eod (false) needs the manifest of data source {path}, which has none:"
                    " prepare it with megallama, or set data.loss_on_eod=true"
                )
            found.setdefault(file.manifest.eod_id, path)
    if len(found) > 1:
        raise UserError(
            f"data.loss_on_eod (false) needs one end-of-document token, data sources have several ({found}):"
            " prepare them with one tokenizer"
        )
    return next(iter(found))
