"""What transformers must know of a tokenizer file beside it: its class and its begin and end tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from megallama.data.tokenizer import HUGGING_FACE_FILE, SENTENCEPIECE_FILE, load_tokenizer

SIDE_FILE = "tokenizer_config.json"


@dataclass(frozen=True)
class TokenIds:
    """Begin of text and end of text, where the tokenizer has them."""

    bos: int | None
    eos: int | None


def write_tokenizer_config(folder: Path) -> TokenIds:
    """Add `tokenizer_config.json` to the tokenizer in `folder` unless it has one.

    Texts are then encoded as in training: no token is put before or after them.

    Raises:
        UserError: the tokenizer cannot be read.
    """
    tokenizer = load_tokenizer(folder)
    ids = TokenIds(bos=tokenizer.bos_id, eos=tokenizer.eod_id)
    if (folder / SIDE_FILE).is_file():
        return ids
    if (folder / HUGGING_FACE_FILE).is_file():
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        pieces = _pieces_of_json(folder / HUGGING_FACE_FILE)
    else:
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "unk_token": "<unk>"}
        config |= {"add_bos_token": False, "add_eos_token": False}
        processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / SENTENCEPIECE_FILE))
        pieces = {i: str(processor.id_to_piece(i)) for i in (ids.bos, ids.eos) if i is not None}
    config |= {"clean_up_tokenization_spaces": False}
    for key, token in (("bos_token", ids.bos), ("eos_token", ids.eos)):
        if token is not None:
            config[key] = pieces[token]
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / SIDE_FILE).write_text(text + "\n", encoding="utf-8")
    return ids


def _pieces_of_json(path: Path) -> dict[int, str]:
    content = json.loads(path.read_text(encoding="utf-8"))
    pieces = {token["id"]: token["content"] for token in content.get("added_tokens", [])}
    vocabulary = content["model"].get("vocab")
    if isinstance(vocabulary, dict):
        return {token: piece for piece, token in vocabulary.items()} | pieces
    return {token: entry[0] for token, entry in enumerate(vocabulary or [])} | pieces
