"""Exports a checkpoint as a Hugging Face model folder: no process group, one block of rows in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megallama.checkpoint.format.integrity import locate_checkpoint
from megallama.checkpoint.format.model_identity import model_of_identity
from megallama.checkpoint.offline.reader import CheckpointReader
from megallama.config.schema import ModelConfig
from megallama.host.dtypes import dtype_name
from megallama.host.errors import UserError
from megallama.huggingface.checkpoint_source import (
    FORMATS,
    Trained,
    blocks,
    check_complete,
    format_of_checkpoint,
    model_of_checkpoint,
    trained_model,
)
from megallama.huggingface.config import hugging_face_config, model_from_hugging_face, same_model
from megallama.huggingface.model_card import CARD_FILE, model_card
from megallama.huggingface.model_folder import (
    CONFIG_FILE,
    GENERATION_FILE,
    IGNORED_FILE,
    KEPT_FOLDER,
    copy_files,
    new_folder,
    read_json,
    write_json,
)
from megallama.huggingface.names import hugging_face_tensors
from megallama.huggingface.safetensors_folder import TensorToWrite, write_safetensors
from megallama.huggingface.tokenizer.agreement import sample_of_run
from megallama.huggingface.tokenizer.export import ExportedTokenizer, agree_on_class, write_tokenizer
from megallama.huggingface.tokenizer.run_data import begin_of_run
from megallama.tokenizers.files import find_tokenizer

DEFAULT_SHARD_BYTES = 5 * 10**9


def export_model(
    source: Path,
    output: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    like: Path | None = None,
    ignore_keys: Sequence[str] = (),
    log: Callable[[str], None] = print,
) -> list[str]:
    """Make the model folder `output` from a checkpoint; the names of the files with weights.

    Args:
        source: A checkpoint, or the folder of a run or of an imported model (its newest intact checkpoint).
        output: Folder to make.
        dtype: `fp32`, `bf16` or `fp16`. If not given: the format that the imported weights had, else that of the run.
        max_shard_bytes: Largest file of weights.
        like: A Hugging Face folder, or an imported model, of the same shape: config.json, generation_config.json
            and the tokenizer are taken from there. If not given: from `source`.
        ignore_keys: Unknown keys of that config.json that change nothing, beside those that an import accepted.
        log: Where a damaged checkpoint that was skipped is named, and what the user should know of the result.

    Raises:
        UserError: no intact checkpoint, `output` exists, a shape without a family, the disk is full.
    """
    checkpoint = locate_checkpoint(source, log=log)
    run = checkpoint.absolute().parent.parent
    reader = CheckpointReader(checkpoint)
    trained = trained_model(run)
    kept = _kept_folder(like) if like is not None else run / KEPT_FOLDER
    original = read_json(kept / CONFIG_FILE) if like is not None or (kept / CONFIG_FILE).is_file() else None
    ignored = [*_ignored(kept), *ignore_keys]
    model = _model(reader, run, trained, original, origin=kept, ignored=ignored)
    chosen = _format(reader, trained, dtype)
    check_complete(reader, model)
    tensors = {
        name: TensorToWrite(made.shape, partial(blocks, reader, made))
        for name, made in hugging_face_tensors(model).items()
    }
    places = [run / "tokenizer"] if like is None else [like / "tokenizer", like]
    found = next((file for place in places if (file := find_tokenizer(place)) is not None), None)
    with new_folder(output) as folder:
        tokenizer = None
        if found is not None:
            begin = partial(begin_of_run, run)
            tokenizer = write_tokenizer(found, folder, context=model.max_seq_len, begin_id=begin)
        _write_configs(folder, model, original, kept, tokenizer, dtype=dtype_name(chosen))
        name = tokenizer.tokenizer.name if tokenizer is not None else None
        (folder / CARD_FILE).write_text(model_card(reader, model, run, tokenizer=name), encoding="utf-8")
        if tokenizer is None:
            log(
                f"{run} holds no tokenizer, so {output} has none: copy the model's there, or name it with --like"
            )
        else:
            _tell(folder, tokenizer, model, run, log=log)
        files = write_safetensors(folder, tensors, dtype=chosen, max_shard_bytes=max_shard_bytes)
    return files


def _tell(
    folder: Path, exported: ExportedTokenizer, model: ModelConfig, run: Path, *, log: Callable[[str], None]
) -> None:
    """What the user should know of the tokenizer, a line each."""
    tokenizer = exported.tokenizer
    if tokenizer.vocab_size > model.vocab_size:
        log(
            f"{tokenizer.path} has {tokenizer.vocab_size} ids, and the model {model.vocab_size}: put the tokenizer of"
            " this model there, or grow the model with megallama expand-vocab"
        )
    for line in agree_on_class(folder, exported, sample_of_run(run, tokenizer)):
        log(line)


def _write_configs(
    folder: Path,
    model: ModelConfig,
    original: dict[str, Any] | None,
    kept: Path,
    exported: ExportedTokenizer | None,
    *,
    dtype: str,
) -> None:
    """config.json and generation_config.json."""
    ids: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None}
    if exported is not None:
        ids = {"bos_token_id": exported.tokenizer.bos_id, "eos_token_id": exported.tokenizer.eod_id}
    if original is None:
        config = hugging_face_config(
            model, dtype=dtype, bos_id=ids["bos_token_id"], eos_id=ids["eos_token_id"]
        )
    else:
        config = {**original, ("dtype" if "dtype" in original else "torch_dtype"): dtype}
    write_json(folder / CONFIG_FILE, config)
    copied = copy_files(kept, folder, (GENERATION_FILE,))
    generation = read_json(folder / GENERATION_FILE) if copied else {key: config.get(key) for key in ids}
    if exported is not None and generation.get("pad_token_id") is None:
        generation["pad_token_id"] = exported.pad_id
    write_json(folder / GENERATION_FILE, {k: v for k, v in generation.items() if v is not None})


def _kept_folder(like: Path) -> Path:
    for folder in (like / KEPT_FOLDER, like):
        if (folder / CONFIG_FILE).is_file():
            return folder
    raise UserError(
        f"--like ({like}) holds no {CONFIG_FILE}: give a Hugging Face folder or an imported model"
    )


def _ignored(kept: Path) -> list[str]:
    """The keys that the user accepted when the model was imported."""
    path = kept / IGNORED_FILE
    return [str(key) for key in read_json(path)["keys"]] if path.is_file() else []


def _model(
    reader: CheckpointReader,
    run: Path,
    trained: Trained | None,
    original: dict[str, Any] | None,
    *,
    origin: Path,
    ignored: Sequence[str],
) -> ModelConfig:
    """The checkpoint's model, with the context that stands beside it."""
    if original is not None:
        stored = model_of_identity(reader.model, name=run.name, max_seq_len=1)
        peer = model_from_hugging_face(
            original,
            name=trained.model.name if trained is not None else run.name,
            vocab_multiple=stored.vocab_multiple,
            origin=str(origin / CONFIG_FILE),
            ignored=ignored,
        )
        differences = same_model(stored, peer)
        if differences:
            raise UserError(
                f"the checkpoint {reader.folder} is of another model than {origin / CONFIG_FILE}"
                f" ({', '.join(differences)}): give --like the folder of this model"
            )
        return peer
    if trained is None:
        raise UserError(
            f"the context of {reader.folder} is not known (no config.yaml in {run}): export it inside its run folder,"
            " or name a Hugging Face folder of the same model with --like"
        )
    return model_of_checkpoint(reader, trained)


def _format(reader: CheckpointReader, trained: Trained | None, asked: str | None) -> torch.dtype:
    if asked is None:
        return format_of_checkpoint(reader, trained)
    if asked not in FORMATS:
        raise UserError(f"--dtype ({asked}) is not a format: use one of {', '.join(FORMATS)}")
    return FORMATS[asked]
