"""The tokenizer of an exported folder: `tokenizer.json`, and beside it what transformers asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megallama.host.errors import UserError
from megallama.huggingface.model_folder import read_json, write_json
from megallama.huggingface.tokenizer.agreement import disagreements
from megallama.tokenizers.begin import begin_token
from megallama.tokenizers.convert import tokenizer_json, with_begin
from megallama.tokenizers.files import (
    HUGGING_FACE_FILE,
    RANKS_SIDE_FILE,
    copy_tokenizer,
)
from megallama.tokenizers.interface import Tokenizer
from megallama.tokenizers.load import HuggingFaceTokenizer, load_tokenizer
from megallama.tokenizers.rank_files import RankTokenizer

SIDE_FILE = "tokenizer_config.json"
_PLAIN_CLASS = "PreTrainedTokenizerFast"
"""The class of transformers that does what tokenizer.json says and nothing of its own."""

_USUAL_PADDING = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>")

_OF_OTHER_CLASSES = (
    "auto_map",
    "legacy",
    "sp_model_kwargs",
    "add_prefix_space",
    "tokenizer_file",
    "vocab_file",
)
"""Keys of a tokenizer_config.json that belong to the class which the source had."""


@dataclass(frozen=True)
class ExportedTokenizer:
    """What was written."""

    tokenizer: Tokenizer
    """The tokenizer of training."""
    begin_id: int | None
    """The token that stood before each text in training."""
    pad_id: int
    """What fills shorter texts of a batch."""


def write_tokenizer(
    source: Path, folder: Path, *, context: int, begin_id: Callable[[Tokenizer], int | None]
) -> ExportedTokenizer:
    """Write the tokenizer file `source` into `folder` with all that transformers needs to cut texts as training did.

    A rank file becomes a tokenizer.json. A sentencepiece model gets one beside it. What the files beside the source
    say is kept, and completed.

    Args:
        source: The tokenizer's file.
        folder: Where it is written.
        context: The most tokens that the model reads.
        begin_id: Which token stood before each text in training.

    Raises:
        UserError: the tokenizer cannot be read, or has no form in tokenizer.json.
    """
    tokenizer = load_tokenizer(source)
    copied = copy_tokenizer(source, folder)
    side = folder / SIDE_FILE
    config: dict[str, Any] = read_json(side) if side.is_file() else {}
    first = begin_id(tokenizer)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        for name in (RANKS_SIDE_FILE, *([copied.name] if isinstance(tokenizer, RankTokenizer) else [])):
            (folder / name).unlink(missing_ok=True)
        try:
            tokenizer_json(tokenizer, begin_id=first).save(str(folder / HUGGING_FACE_FILE))
        except Exception as error:  # the binding raises plain Exception for what it does not know
            raise UserError(
                f"tokenizer {source} has no form in {HUGGING_FACE_FILE} ({error}): put a {HUGGING_FACE_FILE} of the"
                " same ids in its place"
            ) from error
        config = {**_plain(config), "add_bos_token": first is not None}
    elif first != begin_token(tokenizer) or (
        # There transformers leaves add_bos_token aside.
        first is not None and read_json(copied).get("post_processor") is None
    ):
        with_begin(copied, tokenizer, first).save(str(copied))
        config["add_bos_token"] = first is not None
    pad_id = _padding(tokenizer, config)
    for key, token in (
        ("bos_token", tokenizer.bos_id),
        ("eos_token", tokenizer.eod_id),
        ("pad_token", pad_id),
    ):
        if token is not None and config.get(key) is None:
            config[key] = tokenizer.label(token)
    usual = {
        "tokenizer_class": _PLAIN_CLASS,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    config = {**usual, **{key: value for key, value in config.items() if value is not None}}
    write_json(side, config)
    return ExportedTokenizer(tokenizer, first, pad_id)


def agree_on_class(folder: Path, exported: ExportedTokenizer, sample: Sequence[str]) -> list[str]:
    """What differs between training and transformers, a sentence each, once the class of the tokenizer is settled.

    The class that the source names is given up for the plain one where that leaves fewer differences.

    Args:
        folder: The exported folder, with its config.json.
        exported: What was written into it.
        sample: Texts to compare.
    """
    found = disagreements(folder, exported.tokenizer, sample, begin_id=exported.begin_id)
    side = folder / SIDE_FILE
    config = read_json(side)
    if not found or config == _plain(config):
        return found
    write_json(side, _plain(config))
    left = disagreements(folder, exported.tokenizer, sample, begin_id=exported.begin_id)
    if set(left) < set(found):
        return left
    write_json(side, config)
    return found


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in _OF_OTHER_CLASSES}
    return {**kept, "tokenizer_class": _PLAIN_CLASS}


def _padding(tokenizer: Tokenizer, config: dict[str, Any]) -> int:
    """The token that the source names, else one with a usual name, else the end token."""
    named = config.get("pad_token")
    named = named.get("content") if isinstance(named, dict) else named
    special = tokenizer.special_tokens()
    return next((special[name] for name in (named, *_USUAL_PADDING) if name in special), tokenizer.eod_id)
