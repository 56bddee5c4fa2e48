"""Exports a checkpoint as a Hugging Face model folder: no process group, one block of rows in memory at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megallama.checkpoint.format.boxes import DEFAULT_CAP_ELEMENTS
from megallama.checkpoint.format.integrity import locate_checkpoint
from megallama.checkpoint.format.model_identity import model_of_identity
from megallama.checkpoint.offline.reader import CheckpointReader
from megallama.config.load import load_yaml
from megallama.config.schema import Dtype, ModelConfig
from megallama.host.dtypes import FLOATS, dtype_name
from megallama.host.errors import UserError
from megallama.huggingface.config import hugging_face_config, model_from_hugging_face, same_model
from megallama.huggingface.model_folder import (
    CONFIG_FILE,
    GENERATION_FILE,
    KEPT_FOLDER,
    TOKENIZER_FILES,
    copy_files,
    new_folder,
    write_json,
)
from megallama.huggingface.names import Made, canonical_tensors, hugging_face_tensors
from megallama.huggingface.safetensors_folder import TensorToWrite, read_json, write_safetensors
from megallama.huggingface.tokenizer import write_tokenizer_config

FORMATS = {kind.value: FLOATS[kind.full_name] for kind in Dtype if kind is not Dtype.fp64}
DEFAULT_SHARD_BYTES = 5 * 10**9


def export_model(
    source: Path,
    output: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    like: Path | None = None,
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
        log: Where a damaged checkpoint that was skipped is named.

    Raises:
        UserError: no intact checkpoint, `output` exists, a shape without a family, the disk is full.
    """
    checkpoint = locate_checkpoint(source, log=log)
    run = checkpoint.absolute().parent.parent
    reader = CheckpointReader(checkpoint)
    kept = _kept_folder(like) if like is not None else run / KEPT_FOLDER
    original = read_json(kept / CONFIG_FILE) if like is not None or (kept / CONFIG_FILE).is_file() else None
    model = _model(reader, run, original, origin=kept)
    chosen = _format(reader, run, dtype)
    tokenizers = (
        run / "tokenizer"
        if like is None
        else next(folder for folder in (like / "tokenizer", like) if folder.is_dir())
    )
    _check_complete(reader, model)
    tensors = {
        name: TensorToWrite(made.shape, partial(_blocks, reader, made))
        for name, made in hugging_face_tensors(model).items()
    }
    with new_folder(output) as folder:
        copied = copy_files(tokenizers, folder, TOKENIZER_FILES)
        tokenizer = write_tokenizer_config(folder) if copied else None
        if tokenizer and tokenizer.warning:
            log(tokenizer.warning)
        named = dtype_name(chosen)
        if original is None:
            bos_id, eos_id = (tokenizer.bos_id, tokenizer.eos_id) if tokenizer else (None, None)
            config = hugging_face_config(model, dtype=named, bos_id=bos_id, eos_id=eos_id)
        else:
            config = _with_format(original, named)
        write_json(folder / CONFIG_FILE, config)
        if not copy_files(kept, folder, (GENERATION_FILE,)):
            generation = {
                "bos_token_id": config.get("bos_token_id"),
                "eos_token_id": config.get("eos_token_id"),
            }
            write_json(folder / GENERATION_FILE, {k: v for k, v in generation.items() if v is not None})
        files = write_safetensors(folder, tensors, dtype=chosen, max_shard_bytes=max_shard_bytes)
    return files


def _kept_folder(like: Path) -> Path:
    for folder in (like / KEPT_FOLDER, like):
        if (folder / CONFIG_FILE).is_file():
            return folder
    raise UserError(
        f"--like ({like}) holds no {CONFIG_FILE}: give a Hugging Face folder or an imported model"
    )


def _model(
    reader: CheckpointReader, run: Path, original: dict[str, Any] | None, *, origin: Path
) -> ModelConfig:
    """The checkpoint's model; its stored identity leaves out name and context, which stand beside it."""
    stored = model_of_identity(reader.model, name=run.name, max_seq_len=1)
    if original is not None:
        peer = model_from_hugging_face(
            original, name=run.name, vocab_multiple=stored.vocab_multiple, origin=str(origin / CONFIG_FILE)
        )
        differences = same_model(stored, peer)
        if differences:
            raise UserError(
                f"the checkpoint {reader.folder} is of another model than {origin / CONFIG_FILE}"
                f" ({', '.join(differences)}): give --like the folder of this model"
            )
        return dataclasses.replace(stored, max_seq_len=peer.max_seq_len)
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"the context of {reader.folder} is not known (no config.yaml in {run}): export it inside its run folder,"
            " or name a Hugging Face folder of the same model with --like"
        )
    trained = load_yaml(run / "config.yaml").model
    return dataclasses.replace(
        stored, name=trained.name, max_seq_len=trained.max_seq_len, init_std=trained.init_std
    )


def _format(reader: CheckpointReader, run: Path, asked: str | None) -> torch.dtype:
    if asked is not None:
        if asked not in FORMATS:
            raise UserError(f"--dtype ({asked}) is not a format: use one of {', '.join(FORMATS)}")
        return FORMATS[asked]
    source = reader.state.get("source")
    imported = FLOATS.get(str(source.get("dtype"))) if isinstance(source, dict) else None
    if imported is not None and imported in FORMATS.values():
        return imported
    if not (run / "config.yaml").is_file():
        return torch.float32
    trained = load_yaml(run / "config.yaml").precision.dtype
    return FORMATS["fp32" if trained is Dtype.fp64 else trained.value]


def _check_complete(reader: CheckpointReader, model: ModelConfig) -> None:
    wanted = {f"fp32/{key}": made.shape for key, made in canonical_tensors(model).items()}
    held = {f"fp32/{name}": reader.shape(f"fp32/{name}") for name in reader.names()}
    if wanted != held:
        names = sorted(key for key in wanted.keys() | held.keys() if wanted.get(key) != held.get(key))
        raise UserError(
            f"checkpoint {reader.folder} does not hold the tensors of its model ({', '.join(names[:4])}):"
            " use the version that wrote it"
        )


def _blocks(reader: CheckpointReader, made: Made) -> Iterator[torch.Tensor]:
    """The rows of a Hugging Face tensor in order, out of ours."""
    columns = made.shape[1:]
    height = max(1, DEFAULT_CAP_ELEMENTS // math.prod(columns))
    for part in made.parts:
        for start in range(0, part.count, height):
            offset = (part.start + start, *(0 for _ in columns))
            shape = (min(height, part.count - start), *columns)
            yield reader.read(f"fp32/{part.name}", offset=offset, shape=shape)


def _with_format(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    key = "dtype" if "dtype" in config else "torch_dtype"
    return {**config, key: dtype}
