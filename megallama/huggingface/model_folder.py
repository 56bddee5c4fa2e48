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

ADAPTER_FILE = "adapter_config.json"
"""By which the folder of an adapter, which holds no whole model, is known."""


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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: missing, unreadable, or something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: give the folder of a Hugging Face model") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy or download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object: copy or download it again")
    return content


def kept_end_ids(folder: Path) -> list[int]:
    """The end tokens that the generation_config.json of an import names: a chat model's are more than one.

    Raises:
        UserError: the file cannot be read.
    """
    path = folder / KEPT_FOLDER / GENERATION_FILE
    named = read_json(path).get("eos_token_id") if path.is_file() else None
    return [token for token in (named if isinstance(named, list) else [named]) if isinstance(token, int)]


def write_json(path: Path, content: Any) -> None:
    """Write `content` as people read it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
