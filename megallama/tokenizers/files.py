"""The files that a tokenizer is made of. What is loaded is what is copied: one rule for every command.

Imports no tokenizer library: naming a file needs none.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megallama.host.errors import UserError
from megallama.host.files import replacing

SENTENCEPIECE_FILE = "tokenizer.model"
HUGGING_FACE_FILE = "tokenizer.json"
RANKS_SIDE_FILE = "tiktoken.json"
"""`{"pattern", "special_tokens": {name: id}, "eos_token", "bos_token"?, "normalization"?}` beside a rank file."""
TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")
"""Files beside a tokenizer that say which tokens it begins and ends a text with; the first counts before the second."""
SIDE_FILES = (*TOKEN_FILES, "chat_template.jinja", RANKS_SIDE_FILE)
"""Files beside a tokenizer that belong to it."""

_RANK_FILES = "*.tiktoken"


def find_tokenizer(folder: Path) -> Path | None:
    """The file in `folder` that is its tokenizer; None where it holds none.

    Where there are several, `tokenizer.json` is taken, which says more than the others.
    """
    held = [folder / name for name in (HUGGING_FACE_FILE, SENTENCEPIECE_FILE)]
    held += sorted(folder.glob(_RANK_FILES))
    return next((file for file in held if file.is_file()), None)


def locate_tokenizer(path: str | Path) -> Path:
    """The tokenizer's file at `path`, which is that file or its folder.

    Raises:
        UserError: there is none.
    """
    place = Path(path)
    if place.is_dir():
        found = find_tokenizer(place)
        if found is None:
            raise UserError(
                f"tokenizer folder {place} holds neither {HUGGING_FACE_FILE} nor {SENTENCEPIECE_FILE}:"
                " give the file itself or another folder"
            )
        return found
    if not place.exists():
        raise UserError(
            f"tokenizer {place} does not exist: give a .model or tokenizer.json file, or their folder"
        )
    return place


def said_beside(file: Path, key: str) -> Iterator[tuple[Path, Any]]:
    """What the files of `TOKEN_FILES` beside the tokenizer `file` say of `key`, each with its place.

    Raises:
        UserError: one of them cannot be read.
    """
    for name in TOKEN_FILES:
        side = file.with_name(name)
        if not side.is_file():
            continue
        try:
            content: Any = json.loads(side.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{side} cannot be read ({error}): correct or remove it") from error
        if isinstance(content, dict) and content.get(key) is not None:
            yield side, content[key]


def copy_tokenizer(path: str | Path, folder: Path) -> Path:
    """Makes the tokenizer at `path`, a file or its folder, that of `folder`, which is made; returns the copy.

    Exactly the file that `load_tokenizer` reads is copied, with those of `SIDE_FILES` beside it, and the files of any
    other tokenizer in `folder` are removed: `load_tokenizer(folder)` then gives the same as `load_tokenizer(path)`.

    Raises:
        UserError: there is no tokenizer at `path`.
        OSError: a file cannot be read or written.
    """
    source = locate_tokenizer(path)
    target = folder / (HUGGING_FACE_FILE if source.suffix == ".json" else SENTENCEPIECE_FILE)
    is_own = target.exists() and source.name == target.name and source.parent.samefile(folder)
    pairs = {target: source} | {folder / name: source.with_name(name) for name in SIDE_FILES}
    folder.mkdir(parents=True, exist_ok=True)
    kept = {source}
    for new, old in pairs.items():
        if old.is_file():
            if not is_own:
                with old.open("rb") as read, replacing(new) as written:
                    shutil.copyfileobj(read, written)
            kept.add(new)
    ours = (folder / name for name in (HUGGING_FACE_FILE, SENTENCEPIECE_FILE, *SIDE_FILES))
    for stale in {*ours, *folder.glob(_RANK_FILES)} - kept:
        stale.unlink(missing_ok=True)
    return target
