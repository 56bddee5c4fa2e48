"""The data of a run, as far as they are still there: where they are, and which token stands before each text."""

from __future__ import annotations

from pathlib import Path

from megallama.config.load import load_yaml
from megallama.config.names import RUN_FILE
from megallama.host.errors import UserError
from megallama.stream.locate import prefixes_at
from megallama.tokenizers.begin import begin_token
from megallama.tokenizers.interface import Tokenizer
from megallama.tokens.manifest import read_manifest


def prefixes_of_run(run: Path) -> list[str]:
    """The prefixes of all token files that the run names; none of an import."""
    if not (run / RUN_FILE).is_file():
        return []
    found = []
    for source in load_yaml(run / RUN_FILE).data.all_sources():
        try:
            found += prefixes_at(source.path)
        except UserError:
            continue
    return found


def begin_of_run(run: Path, tokenizer: Tokenizer) -> int | None:
    """The token that stands before each text: as in the run's data, else where the tokenizer's files say so."""
    for prefix in prefixes_of_run(run):
        try:
            manifest = read_manifest(prefix)
        except (UserError, OSError):
            continue
        if manifest is not None:
            return manifest.begin_id
    return begin_token(tokenizer)
