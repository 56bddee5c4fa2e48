"""Resolves a path to prepared data: a prefix, an output folder of `megallama prepare`, or a run folder."""

from __future__ import annotations

import os
from pathlib import Path

from megallama.config.load import load_yaml
from megallama.config.names import RUN_FILE
from megallama.host.errors import UserError
from megallama.stream.ledger import LEDGER_FILE, read_ledger
from megallama.tokens.manifest import REPORT, SUFFIXES, TRAIN, VALID


def prefixes_at(path: str | Path) -> list[str]:
    """Prefixes of the data that `path` means: a prefix itself, a folder of `megallama prepare`, or a run folder.

    A run folder means all that it was trained on so far, and all that its configuration names.

    Raises:
        UserError: there is none of these.
    """
    folder = Path(path)
    if (folder / REPORT).is_file():
        return [str(folder / name) for name in (TRAIN, VALID) if (folder / f"{name}.json").exists()]
    config, ledger = folder / RUN_FILE, folder / LEDGER_FILE
    if config.is_file() or ledger.is_file():
        named = [entry.path for entry in load_yaml(config).data.all_sources()] if config.is_file() else []
        segments = read_ledger(folder).segments if ledger.is_file() else ()
        used = [source.path for segment in segments for source in segment.mix.sources]
        return list(dict.fromkeys([*used, *named]))
    if any(os.path.isfile(f"{path}{suffix}") for suffix in SUFFIXES):
        return [str(path)]
    raise UserError(
        f"{path} is no data (no .bin, .idx or .json at this prefix, no folder of megallama prepare, no run folder):"
        " correct the path"
    )
