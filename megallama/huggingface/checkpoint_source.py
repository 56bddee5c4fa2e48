"""A checkpoint as the source of a Hugging Face model: its shape, its number format, and its tensors row by row."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from megallama.checkpoint.format.boxes import DEFAULT_CAP_ELEMENTS
from megallama.checkpoint.format.model_identity import model_of_identity
from megallama.checkpoint.offline.reader import CheckpointReader
from megallama.config.load import load_model_yaml, load_yaml, model_to_yaml
from megallama.config.names import RUN_FILE
from megallama.config.schema import Dtype, ModelConfig, RopeScaling
from megallama.host.dtypes import FLOATS
from megallama.host.errors import UserError
from megallama.huggingface.names import Made, canonical_tensors

FORMATS = {kind.value: FLOATS[kind.full_name] for kind in Dtype if kind is not Dtype.fp64}


@dataclasses.dataclass(frozen=True)
class Trained:
    """What the folder of a checkpoint says of its model, beside what the checkpoint itself says."""

    model: ModelConfig
    """Its shape, in which only name, context and spread of initial weights count."""
    seq_len: int
    """Length of the sequences that it was trained on."""
    dtype: Dtype
    """In which it was trained, or in which its weights came."""


def trained_model(run: Path) -> Trained | None:
    """What `run` says: the folder of a run, of an import, or of a grown vocabulary; None for any other folder."""
    if (run / RUN_FILE).is_file():
        config = load_yaml(run / RUN_FILE)
        return Trained(config.model, config.train.seq_len, config.precision.dtype)
    shapes = sorted((run / "conf" / "model").glob("*.yaml"))
    if len(shapes) != 1 or not (run / "checkpoints").is_dir():
        return None
    model = load_model_yaml(shapes[0])
    # Dynamic NTK raises the base by what seq_len exceeds this: a prompt begins with the plain one.
    is_dynamic = model.rope_scaling is RopeScaling.dynamic
    seq_len = min(model.max_seq_len, model.rope_original_max_seq_len) if is_dynamic else model.max_seq_len
    return Trained(model, seq_len, Dtype.fp32)


def write_shape(folder: Path, model: ModelConfig) -> None:
    """Write the shape of an import or a grown vocabulary where `trained_model` finds it."""
    shapes = folder / "conf" / "model"
    shapes.mkdir(parents=True, exist_ok=True)
    (shapes / f"{model.name}.yaml").write_text(model_to_yaml(model), encoding="utf-8")


def model_of_checkpoint(reader: CheckpointReader, trained: Trained) -> ModelConfig:
    """The checkpoint's model; its stored identity leaves out name and context, which stand beside it."""
    beside = trained.model
    stored = model_of_identity(reader.model, name=beside.name, max_seq_len=beside.max_seq_len)
    return dataclasses.replace(stored, init_std=beside.init_std)


def format_of_checkpoint(reader: CheckpointReader, trained: Trained | None) -> torch.dtype:
    """The format that the imported weights had, else that of the run."""
    source = reader.state.get("source")
    imported = FLOATS.get(str(source.get("dtype"))) if isinstance(source, dict) else None
    if imported is not None and imported in FORMATS.values():
        return imported
    if trained is None:
        return torch.float32
    return FORMATS["fp32" if trained.dtype is Dtype.fp64 else trained.dtype.value]


def check_complete(reader: CheckpointReader, model: ModelConfig) -> None:
    """That the checkpoint holds the tensors of `model` and no others.

    Raises:
        UserError: it does not.
    """
    wanted = {f"fp32/{key}": made.shape for key, made in canonical_tensors(model).items()}
    held = {f"fp32/{name}": reader.shape(f"fp32/{name}") for name in reader.names()}
    if wanted != held:
        names = sorted(key for key in wanted.keys() | held.keys() if wanted.get(key) != held.get(key))
        raise UserError(
            f"checkpoint {reader.folder} does not hold the tensors of its model ({', '.join(names[:4])}):"
            " use the version that wrote it"
        )


def blocks(reader: CheckpointReader, made: Made) -> Iterator[torch.Tensor]:
    """The rows of a Hugging Face tensor in order, out of ours."""
    columns = made.shape[1:]
    height = max(1, DEFAULT_CAP_ELEMENTS // math.prod(columns))
    for part in made.parts:
        for start in range(0, part.count, height):
            offset = (part.start + start, *(0 for _ in columns))
            shape = (min(height, part.count - start), *columns)
            yield reader.read(f"fp32/{part.name}", offset=offset, shape=shape)
