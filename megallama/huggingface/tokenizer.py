"""What transformers needs beside a tokenizer's file: its class, its begin and end tokens, its prefix."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megallama.tokenizers.load import HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer

SIDE_FILE = "tokenizer_config.json"


@dataclass(frozen=True)
class ExportedTokenizer:
    """What was found and done."""

    bos_id: int | None
    """Begin of text, where there is one."""
    eos_id: int
    """End of text."""
    warning: str | None
    """Why transformers would cut a text into other tokens."""


def write_tokenizer_config(folder: Path) -> ExportedTokenizer:
    """Add `tokenizer_config.json` to the tokenizer in `folder` unless it has one.

    Texts are then encoded as in training: no token is put before or after them.

    Raises:
        UserError: the tokenizer cannot be read.
    """
    tokenizer = load_tokenizer(folder)
    warning = None
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(tokenizer, SentencePieceTokenizer):
        spec, trainer = tokenizer.proto.normalizer_spec, tokenizer.proto.trainer_spec
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
        config |= {"add_bos_token": False, "add_eos_token": False, "add_prefix_space": spec.add_dummy_prefix}
        config["unk_token"] = tokenizer.label(trainer.unk_id)
        if trainer.model_type != trainer.BPE or spec.name != "identity" or spec.remove_extra_whitespaces:
            warning = (
                f"{tokenizer.path.name} is no plain BPE model (normalization {spec.name!r}): transformers would cut"
                " texts into other tokens; convert it to tokenizer.json first"
            )
    elif not isinstance(tokenizer, HuggingFaceTokenizer):
        warning = (
            f"{tokenizer.path.name} is a tiktoken list, which transformers does not read: put the tokenizer.json of"
            " the model into the exported folder"
        )
    if not (folder / SIDE_FILE).is_file():
        for key, token in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eod_id)):
            if token is not None:
                config[key] = tokenizer.label(token)
        text = json.dumps({**config, "clean_up_tokenization_spaces": False}, indent=2, ensure_ascii=False)
        (folder / SIDE_FILE).write_text(text + "\n", encoding="utf-8")
    return ExportedTokenizer(tokenizer.bos_id, tokenizer.eod_id, warning)
