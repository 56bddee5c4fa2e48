"""Imports a Hugging Face model folder as a checkpoint to train from, one block of rows in memory at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from megallama.checkpoint.format.model_identity import model_identity
from megallama.checkpoint.offline.writer import CheckpointWriter
from megallama.config.load import is_shipped_otherwise
from megallama.config.schema import ModelConfig
from megallama.host.errors import UserError
from megallama.huggingface.checkpoint_source import write_shape
from megallama.huggingface.config import model_from_hugging_face
from megallama.huggingface.model_folder import (
    ADAPTER_FILE,
    CONFIG_FILE,
    GENERATION_FILE,
    IGNORED_FILE,
    KEPT_FOLDER,
    copy_files,
    new_folder,
    read_json,
    write_json,
)
from megallama.huggingface.safetensors_folder import is_whole_model
from megallama.huggingface.weights import HuggingFaceWeights, row_blocks
from megallama.tokenizers.files import copy_tokenizer, find_tokenizer


def import_model(
    source: Path,
    output: Path,
    *,
    name: str | None = None,
    vocab_multiple: int = 128,
    ignore_keys: Sequence[str] = (),
) -> ModelConfig:
    """Make `output` from the model folder `source`: a weights-only checkpoint, its shape and its tokenizer.

    `output` holds `checkpoints/step-00000000` (fp32, for `train.init_from`), `conf/model/<name>.yaml` (for
    `--config-dir output/conf model=<name>`), `tokenizer/`, and `huggingface/` with config.json and
    generation_config.json as they were.

    Args:
        source: Folder with config.json and safetensors files.
        output: Folder to make.
        name: Name of the shape; that of the output folder if not given.
        vocab_multiple: The embedding is padded to a multiple of this, with zeros.
        ignore_keys: Keys of config.json that are unknown here and change nothing in what the model computes.

    Raises:
        UserError: unknown or unsupported keys, tensors missing, too many or of another shape, damaged files, another
            shape of this name in conf/model/, `output` exists, the disk is full.
    """
    if vocab_multiple < 1:
        raise UserError(f"--vocab-multiple ({vocab_multiple}) must be at least 1: 128 is usual")
    name = name or output.absolute().name
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(
            f"the name of the shape ({name!r}) must be letters, digits, '_', '-', '.': give --name"
        )
    if (source / ADAPTER_FILE).is_file() and not is_whole_model(source):
        base = read_json(source / ADAPTER_FILE).get("base_model_name_or_path")
        raise UserError(
            f"{source} holds an adapter ({ADAPTER_FILE}; LoRA or another) of the model {base!r} and no whole model:"
            " merge it into that model with PEFT (merge_and_unload, save_pretrained) and import the result"
        )
    config = read_json(source / CONFIG_FILE)
    model = model_from_hugging_face(
        config,
        name=name,
        vocab_multiple=vocab_multiple,
        origin=str(source / CONFIG_FILE),
        ignored=ignore_keys,
    )
    if is_shipped_otherwise(name, model):
        raise UserError(
            f"the name of the shape ({name}) is that of another one in conf/model/: give another with --name"
        )
    tokenizer = find_tokenizer(source)
    with HuggingFaceWeights(source, model=model) as weights:
        size_bytes = 4 * sum(math.prod(tensor.shape) for tensor in weights.canonical.values())
        with new_folder(output) as folder:
            state = {"source": {"model_type": config["model_type"], "dtype": weights.widest_dtype}}
            with CheckpointWriter(
                folder / "checkpoints",
                step=0,
                model=model_identity(model),
                state=state,
                size_bytes=size_bytes,
            ) as writer:
                for key in weights.canonical:
                    _write_tensor(writer, key, weights)
            write_shape(folder, model)
            copy_files(source, folder / KEPT_FOLDER, (CONFIG_FILE, GENERATION_FILE))
            if ignore_keys:
                write_json(folder / KEPT_FOLDER / IGNORED_FILE, {"keys": list(dict.fromkeys(ignore_keys))})
            if tokenizer is not None:
                copy_tokenizer(tokenizer, folder / "tokenizer")
    return model


def _write_tensor(writer: CheckpointWriter, name: str, weights: HuggingFaceWeights) -> None:
    shape = weights.canonical[name].shape
    columns = shape[1:]
    for start, count in row_blocks(shape[0], math.prod(columns)):
        offset = (start, *(0 for _ in columns))
        block = weights.read(name, offset=offset, shape=(count, *columns))
        writer.write_box(f"fp32/{name}", block, offset=offset, whole=shape)
