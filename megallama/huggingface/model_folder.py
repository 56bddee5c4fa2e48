"""Shared by import and export: a folder that appears only when complete, and the files beside the weights."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megallama.checkpoint.format.disk import writing
from megallama.host.errors import UserError
from megallama.host.files import fsync_folder

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
KEPT_FOLDER = "huggingface"
"""Where an imported model keeps `config.json` and `generation_config.json` as they were."""

IGNORED_FILE = "ignored_keys.json"
"""Keys of that `config.json` that the user accepted by name when it was imported."""

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "tiktoken.json"),
)
"""Files of a tokenizer in a model folder."""


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `path` when the block ends; an exception in the block removes it.

    Raises:
        UserError: `path` exists, or the disk is full or says no.
    """
    if os.path.lexists(path):
        raise UserError(f"{path} exists already: give a new folder, or move the old one away")
    with writing(path, needed_bytes=0):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
        temporary.mkdir()
        try:
            yield temporary
            fsync_folder(temporary)
            if os.path.lexists(path):  # made by somebody else meanwhile; rename would replace an empty folder
                raise UserError(f"{path} exists already: give a new folder, or move the old one away")
            os.rename(temporary, path)
            fsync_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def copy_files(source: Path, target: Path, names: tuple[str, ...]) -> list[str]:
    """Copy those of `names` that exist in `source`; `target` is made where there are any."""
    found = [name for name in names if (source / name).is_file()]
    for name in found:
        target.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return found


def write_json(path: Path, content: Any) -> None:
    """Write `content` as people read it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
