"""Opens the data of a run: its sources, what is mixed when, and what is held out for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megallama.config.schema import Packing, RunConfig, SourceConfig
from megallama.data.history import History, Mix
from megallama.data.prepared import check_token_file, content_identity, read_manifest, shard_prefixes
from megallama.data.source import JoinedSource, cut_for_validation
from megallama.data.stream import SampleStream, SourceShelf, build_mix
from megallama.data.token_file import TokenFile
from megallama.data.windows import Cutting
from megallama.host.errors import ConfigError, UserError

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


def open_data(config: RunConfig) -> RunData:
    """The data that `config` names.

    Raises:
        ConfigError: missing or damaged files, all at once, or a vocabulary larger than the model's.
        UserError: a source too short for one sample, one named twice, or a weight that is none.
    """
    entries = list(config.data.all_sources())
    paths = dict.fromkeys(entry.path for entry in entries)
    problems = [problem for path in paths for problem in check_token_file(path)]
    if problems:
        raise ConfigError(problems)
    files = {path: open_files(path) for path in paths}
    for path, parts in files.items():
        _check_vocabulary(path, parts, vocab_size=config.model.vocab_size)
    opened = _open_sources(config, files)
    shelf = SourceShelf(
        [source for pair in opened.values() for source in pair if source is not None],
        index_folder=Path(config.train.run_dir) / INDEX_FOLDER,
    )
    cutting = Cutting(
        seq_len=config.train.seq_len, seed=config.train.seed, is_cut=config.data.packing is Packing.cut
    )
    plan = tuple(
        (step, _mix(shelf, opened, sources, cutting=cutting))
        for step, sources in (
            (0, config.data.sources),
            *((entry.from_step, entry.sources) for entry in config.data.schedule),
        )
    )
    return RunData(
        shelf=shelf,
        plan=plan,
        validation=_validation(config, shelf, opened, cutting=cutting),
        eod_id=None if config.data.loss_on_eod else _eod_id(files),
    )


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
                    f"data source {entry.path} has changed since the run was trained on it: put the files of"
                    " that time back"
                )
            opened[entry.identity] = source
    return SourceShelf(list(opened.values()), index_folder=index_folder)


_Opened = dict[tuple[str, float], tuple[JoinedSource, JoinedSource | None]]
"""(path, validation fraction) -> (what is trained on, what is held out)."""


def _open_sources(config: RunConfig, files: dict[str, list[TokenFile]]) -> _Opened:
    opened: _Opened = {}
    for entry in config.data.all_sources():
        key = (entry.path, entry.validation_fraction)
        if key not in opened:
            whole = JoinedSource(entry.path, files[entry.path], content=_content(entry.path))
            opened[key] = (
                cut_for_validation(whole, files[entry.path], entry.validation_fraction)
                if entry.validation_fraction
                else (whole, None)
            )
    return opened


def _mix(shelf: SourceShelf, opened: _Opened, sources: Sequence[SourceConfig], *, cutting: Cutting) -> Mix:
    entries = [
        (opened[entry.path, entry.validation_fraction][0], entry.weight, entry.max_epochs)
        for entry in sources
    ]
    return build_mix(shelf, entries, cutting=cutting)


def _validation(
    config: RunConfig, shelf: SourceShelf, opened: _Opened, *, cutting: Cutting
) -> SampleStream | None:
    """Validation data, and what sources hold out, in the order of the files."""
    entries = [
        (opened[entry.path, 0.0][0], entry.weight, None) for entry in config.data.validation if entry.weight
    ]
    for entry in config.data.sources:
        held_out = opened[entry.path, entry.validation_fraction][1]
        if held_out is not None and entry.weight:
            entries.append((held_out, entry.weight, None))
    if not entries:
        return None
    in_order = Cutting(cutting.seq_len, cutting.seed, is_cut=cutting.is_cut, is_shuffled=False)
    mix = build_mix(shelf, entries, cutting=in_order)
    history = History().continued(0, global_batch_size=config.train.global_batch_size, plan=[(0, mix)])
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
