"""The raw file, and the place in it, from which each prepared document came.

Beside a token file `<prefix>.bin` stands `<prefix>.origins`: two little-endian int64 a document, the number of its
file in `files.json` of the same folder, and its place there: the byte (of the text, where the file is compressed) or
the row (Parquet) at which it begins, from 0; -1 where the file is one document. Imports no torch.
"""

from __future__ import annotations

import json
import struct
from functools import lru_cache
from pathlib import Path

SUFFIX = ".origins"
FILES = "files.json"
WHOLE_FILE = -1

_RECORD = struct.Struct("<qq")


def origin_of(prefix: str | Path, document: int) -> str | None:
    """`file`, or `file:place`, of document number `document` of a token file; None where nothing is recorded."""
    try:
        with open(f"{prefix}{SUFFIX}", "rb") as stream:
            stream.seek(document * _RECORD.size)
            number, place = _RECORD.unpack(stream.read(_RECORD.size))
        name = _file_names(Path(prefix).parent / FILES)[number]
    except (OSError, struct.error, ValueError, IndexError):
        return None  # of an older megallama, of Megatron, or copied without these files
    return name if place == WHOLE_FILE else f"{name}:{place}"


@lru_cache(maxsize=8)
def _file_names(path: Path) -> list[str]:
    names: list[str] = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    return names
