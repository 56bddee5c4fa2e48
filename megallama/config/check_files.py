"""Rules about files on disk: data, tokenizer, run folder. Readers of other layers' files are passed in."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from megallama.config.load import load_yaml
from megallama.config.names import RUN_FILE
from megallama.config.same_model import differing_settings
from megallama.config.schema import RunConfig, SourceConfig
from megallama.config.typed import plain
from megallama.host.built_kernels import refusal, why_not_built
from megallama.host.errors import ConfigError, UserError

SPARE_RATIO = 0.01
"""Share of a model's rows that its tokenizer may leave unused, as in Qwen's published models (under 0.3%)."""


class ManifestLike(Protocol):
    """What is asked of a manifest."""

    @property
    def vocab_size(self) -> int:
        """Token ids of the tokenizer that made the data."""

    @property
    def tokenizer_name(self) -> str:
        """Its name."""

    @property
    def tokenizer_sha256(self) -> str:
        """Checksum of its file."""

    @property
    def eod_id(self) -> int:
        """The token that closes each document."""

    @property
    def begin_id(self) -> int | None:
        """The token that each document begins with; None: none."""


class TokenizerLike(Protocol):
    """What is asked of a tokenizer."""

    @property
    def name(self) -> str:
        """Kind and size."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    def sha256(self) -> str:
        """Checksum of its file."""

    @property
    def eod_id(self) -> int:
        """End of document."""


@dataclasses.dataclass(frozen=True)
class Probes:
    """How to look into files that layers above this one own."""

    check_token_file: Callable[[str], list[str]]
    """Problems of the token file at a prefix."""
    read_manifest: Callable[[str], ManifestLike | None]
    """TokenManifest of the token file at a prefix; raises UserError."""
    load_tokenizer: Callable[[str], TokenizerLike]
    """The tokenizer in a file; raises UserError."""


def check_data_is_named(config: RunConfig) -> Iterator[str]:
    """There is something to train on; a rule of runs that are not given their data by argument."""
    if not config.data.sources:
        yield (
            "data.sources ([]) must name what to train on: add data.sources=[path/to/prefix],"
            " made by `megallama prepare`"
        )


def check_sources(config: RunConfig, probes: Probes) -> Iterator[str]:
    """What the run trains on is there in known proportions, and intact."""
    data = config.data
    lists = [("data.sources", data.sources), ("data.validation", data.validation)]
    lists += [(f"data.schedule.{n}.sources", entry.sources) for n, entry in enumerate(data.schedule)]
    seen = set()
    for key, sources in lists:
        if sources and all(source.weight == 0 for source in sources):
            yield f"{key} have no weight above 0 (all are 0): give at least one source a weight"
        for index, source in enumerate(sources):
            yield from check_numbers(f"{key}.{index}", source)
            if source.path not in seen:
                yield from probes.check_token_file(source.path)
            seen.add(source.path)


def check_numbers(key: str, source: SourceConfig) -> Iterator[str]:
    """Weight, epochs and held-out share of a source; those that are not finite are told by the rule on all numbers."""
    if math.isfinite(source.weight) and source.weight < 0:
        yield (
            f"{key}.weight ({source.weight:g} of {source.path}) must not be negative:"
            " leave the source out or give it a weight"
        )
    epochs, fraction = source.max_epochs, source.validation_fraction
    if epochs is not None and math.isfinite(epochs) and epochs <= 0:
        yield (
            f"{key}.max_epochs ({epochs:g} of {source.path}) must be above 0:"
            " leave the source out, or give null for no limit"
        )
    if math.isfinite(fraction) and not 0 <= fraction < 1:
        yield f"{key}.validation_fraction ({fraction:g} of {source.path}) must be in [0, 1): 0.01 is usual"
    if fraction and key.startswith("data.validation."):
        yield (
            f"{key}.validation_fraction ({fraction:g} of {source.path}) has no effect, all of it is evaluated on:"
            " leave it out"
        )


def check_data_schedule(config: RunConfig) -> Iterator[str]:
    """Scheduled mixes have sources, and come one after another within the run."""
    before = 0
    for index, entry in enumerate(config.data.schedule):
        key = f"data.schedule.{index}"
        if not entry.sources:
            yield f"{key}.sources ([]) must name what to train on from step {entry.from_step} on: add sources"
        if not before < entry.from_step < config.train.steps:
            yield (
                f"{key}.from_step ({entry.from_step}) must lie between {before} and train.steps"
                f" ({config.train.steps}), both excluded: order the mixes by their steps"
            )
        before = max(before, entry.from_step)


def check_vocabulary(config: RunConfig, probes: Probes) -> Iterator[str]:
    """Model, tokenizer and data speak of the same token ids."""
    vocab_size, path = config.model.vocab_size, config.data.tokenizer
    tokenizer = None
    if path:
        try:
            tokenizer = probes.load_tokenizer(path)
        except UserError as error:
            yield str(error)
    if tokenizer and not 0 <= vocab_size - tokenizer.vocab_size <= vocab_size * SPARE_RATIO:
        yield (
            f"model.vocab_size ({vocab_size}) must be the tokenizer's ({tokenizer.vocab_size} in {path}):"
            f" set model.vocab_size={tokenizer.vocab_size}, or data.tokenizer to the file of the model"
        )
    scheduled = [source for entry in config.data.schedule for source in entry.sources]
    sources = config.data.sources + config.data.validation + scheduled
    begins: dict[int | None, str] = {}
    for source in {source.path: source for source in sources}.values():
        try:
            manifest = probes.read_manifest(source.path)
        except UserError:
            continue  # check_sources tells
        if manifest is None:
            continue
        if tokenizer and manifest.tokenizer_sha256 != tokenizer.sha256:
            yield (
                f"data {source.path} was made with another tokenizer ({manifest.tokenizer_name}) than"
                f" data.tokenizer ({tokenizer.name} in {path}): prepare it again, or set data.tokenizer to"
                " the file that it was made with"
            )
        elif tokenizer and manifest.eod_id != tokenizer.eod_id:  # named by a file beside the tokenizer
            yield (
                f"data {source.path} ends its documents with token {manifest.eod_id}, data.tokenizer ({path}) with"
                f" {tokenizer.eod_id}: prepare it again, or correct eos_token in the files beside the tokenizer"
            )
        elif not tokenizer and manifest.vocab_size > vocab_size:
            yield (
                f"model.vocab_size ({vocab_size}) is too small for data {source.path} (made with"
                f" {manifest.tokenizer_name}, {manifest.vocab_size} ids): set"
                f" model.vocab_size={manifest.vocab_size}"
            )
        else:
            begins.setdefault(manifest.begin_id, source.path)
    if len(begins) > 1:
        yield _different_begins(begins)


def _different_begins(begins: dict[int | None, str]) -> str:
    """Of data that begins its documents differently; `begins` has a source for each begin token."""
    # The one without comes last: only it has another remedy.
    ordered = sorted(begins.items(), key=lambda item: item[0] is None)
    (one, path), (other, other_path) = ordered[0], ordered[-1]
    problem = f"data {path} begins its documents with token {one}, data {other_path} with"
    if other is None:
        return (
            f"{problem} none: prepare one again, {other_path} with --begin-token always or {path} with"
            " --begin-token never"
        )
    return f"{problem} token {other}: prepare both again with the same tokenizer and --begin-token always"


def check_run_dir(config: RunConfig) -> Iterator[str]:
    """The run folder can be written."""
    path = Path(config.train.run_dir)
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    which = "it" if existing == path else str(existing)
    if not existing.is_dir():
        yield f"train.run_dir ({path}) cannot be a folder: {which} is a file; choose another train.run_dir"
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield (
            f"train.run_dir ({path}) cannot be written: no permission in {which};"
            " choose another train.run_dir"
        )


def check_same_model(config: RunConfig) -> Iterator[str]:
    """Checkpoints in the run folder are of this model, since the run goes on from them."""
    path = Path(config.train.run_dir)
    try:
        if not any((path / "checkpoints").iterdir()) or not (path / RUN_FILE).exists():
            return  # checkpoints alone, copied from elsewhere: loading compares the model
        before = load_yaml(path / RUN_FILE).model
    except ConfigError:
        return  # damaged: the start writes it anew, and loading compares the model
    except OSError:
        return  # no checkpoints to go on from
    differences = [
        f"model.{key} {there} there, {here} here"
        for key, (there, here) in differing_settings(plain(before), plain(config.model)).items()
    ]
    if differences:
        yield (
            f"train.run_dir ({path}) holds checkpoints of another model ({'; '.join(differences)}):"
            " choose another train.run_dir or the same model"
        )


def check_kernels(config: RunConfig) -> Iterator[str]:
    """Kernels that are asked for by name are built here."""
    for field in dataclasses.fields(config.kernels):
        name = getattr(config.kernels, field.name).value
        if reason := why_not_built(field.name, name):
            yield refusal(field.name, name, reason)
