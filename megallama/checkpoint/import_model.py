"""A Hugging Face model folder as a checkpoint to train from, one block of rows in memory at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from megallama.checkpoint.boxes import DEFAULT_CAP_ELEMENTS, Ints
from megallama.checkpoint.facts import model_facts
from megallama.checkpoint.model_folder import (
    CONFIG_FILE,
    GENERATION_FILE,
    KEPT_FOLDER,
    TOKENIZER_FILES,
    copy_files,
    new_folder,
)
from megallama.checkpoint.safetensors_folder import SafetensorsFolder, read_json
from megallama.checkpoint.writer import CheckpointWriter
from megallama.config.load import is_shipped_otherwise, model_to_yaml
from megallama.config.schema import ModelConfig
from megallama.host.errors import UserError
from megallama.model.hugging_face_config import model_from_hugging_face
from megallama.model.hugging_face_names import (
    EMBEDDING,
    OUTPUT,
    Made,
    canonical_tensors,
    hugging_face_tensors,
)

_BUFFERS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Rotary frequencies that old files hold beside the weights; config.json says the same."""


def import_model(
    source: Path, output: Path, *, name: str | None = None, vocab_multiple: int = 128
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

    Raises:
        UserError: unknown or unsupported keys, tensors missing, too many or of another shape, damaged files, another
            shape of this name in conf/model/, `output` exists, the disk is full.
    """
    if vocab_multiple < 1:
        raise UserError(f"--vocab-multiple ({vocab_multiple}) must be 1 or more")
    name = name or output.absolute().name
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(
            f"the name of the shape ({name!r}) must be letters, digits, '_', '-', '.': give --name"
        )
    config = read_json(source / CONFIG_FILE)
    model = model_from_hugging_face(
        config, name=name, vocab_multiple=vocab_multiple, origin=str(source / CONFIG_FILE)
    )
    if is_shipped_otherwise(name, model):
        raise UserError(
            f"the name of the shape ({name}) is that of another one in conf/model/: give another with --name"
        )
    with SafetensorsFolder(source) as weights:
        _check_tensors(weights, model)
        made = canonical_tensors(model)
        size_bytes = 4 * sum(math.prod(tensor.shape) for tensor in made.values())
        with new_folder(output) as folder:
            state = {"source": {"model_type": config["model_type"], "dtype": _widest(weights)}}
            with CheckpointWriter(
                folder / "checkpoints", step=0, model=model_facts(model), state=state, size_bytes=size_bytes
            ) as writer:
                for key, tensor in made.items():
                    _write_tensor(writer, f"fp32/{key}", tensor, weights)
            (folder / "conf" / "model").mkdir(parents=True)
            text = model_to_yaml(model)
            (folder / "conf" / "model" / f"{name}.yaml").write_text(text, encoding="utf-8")
            copy_files(source, folder / KEPT_FOLDER, (CONFIG_FILE, GENERATION_FILE))
            copy_files(source, folder / "tokenizer", TOKENIZER_FILES)
    return model


def _check_tensors(weights: SafetensorsFolder, model: ModelConfig) -> None:
    """The folder holds the tensors of the model, no others, each of its shape."""
    wanted = {name: made.shape for name, made in hugging_face_tensors(model).items()}
    held = {name: shape for name, shape in weights.shapes.items() if not _BUFFERS.fullmatch(name)}
    if model.tie_embeddings and OUTPUT in held:
        wanted[OUTPUT] = wanted[EMBEDDING]
    problems = _differences(wanted, held)
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise UserError(
            f"{weights.folder}: the weights are not those of {CONFIG_FILE} ({shown}): use files that belong together"
        )
    if model.tie_embeddings and OUTPUT in held:
        _check_tie(weights, model)


def _differences(wanted: Mapping[str, Ints], held: Mapping[str, Ints]) -> list[str]:
    return [
        *(f"{name} is missing" for name in sorted(wanted.keys() - held.keys())),
        *(f"{name} is unknown" for name in sorted(held.keys() - wanted.keys())),
        *(
            f"{name} is {list(held[name])}, not {list(wanted[name])}"
            for name in sorted(wanted.keys() & held.keys())
            if held[name] != wanted[name]
        ),
    ]


def _check_tie(weights: SafetensorsFolder, model: ModelConfig) -> None:
    """A head that is stored although it is tied must be the embedding."""
    for start, count in _blocks(model.vocab_size, model.hidden_size):
        one, other = (weights.rows(name, start=start, count=count) for name in (EMBEDDING, OUTPUT))
        if not torch.equal(one, other):
            raise UserError(
                f"{weights.folder}: {OUTPUT} differs from {EMBEDDING} although tie_word_embeddings is true:"
                " set it to false in config.json to keep both"
            )


def _write_tensor(writer: CheckpointWriter, key: str, made: Made, weights: SafetensorsFolder) -> None:
    width, columns = math.prod(made.shape[1:]), made.shape[1:]
    position = 0
    for part in made.parts:
        for start, count in _blocks(part.count, width):
            block = weights.rows(part.name, start=part.start + start, count=count).to(torch.float32)
            writer.write_box(key, block, offset=(position + start, *(0 for _ in columns)), whole=made.shape)
        position += part.count
    for start, count in _blocks(made.shape[0] - position, width):
        zeros = torch.zeros(count, *columns)
        writer.write_box(key, zeros, offset=(position + start, *(0 for _ in columns)), whole=made.shape)


def _blocks(rows: int, width: int) -> list[tuple[int, int]]:
    """(first row, number of rows) of parts of a bounded number of elements."""
    height = max(1, DEFAULT_CAP_ELEMENTS // width)
    return [(start, min(height, rows - start)) for start in range(0, rows, height)]


def _widest(weights: SafetensorsFolder) -> str:
    """The format that holds every tensor exactly."""
    used = {dtype for name, dtype in weights.dtypes.items() if not _BUFFERS.fullmatch(name)}
    chosen = used.pop() if len(used) == 1 else torch.float32
    return str(chosen).removeprefix("torch.")
