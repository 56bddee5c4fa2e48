"""The weights of a Hugging Face folder as canonical tensors, of which only the requested parts are read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megallama.checkpoint.format.boxes import DEFAULT_CAP_ELEMENTS, BoxedTensor, Ints
from megallama.checkpoint.format.model_identity import check_model, model_identity
from megallama.checkpoint.format.record import JSON
from megallama.config.same_model import WITHOUT_WEIGHTS
from megallama.config.schema import ModelConfig
from megallama.host.dtypes import dtype_name
from megallama.host.errors import UserError
from megallama.huggingface.config import model_from_hugging_face
from megallama.huggingface.model_folder import CONFIG_FILE, read_json
from megallama.huggingface.names import (
    EMBEDDING,
    OUTPUT,
    Made,
    canonical_tensors,
    hugging_face_tensors,
)
from megallama.huggingface.safetensors_folder import SafetensorsFolder
from megallama.topology.agreement import Ranks

_BUFFERS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Rotary frequencies that old files hold beside the weights; config.json says the same."""


def is_hugging_face(folder: Path) -> bool:
    """Whether `folder` has the config.json by which Hugging Face's models are known."""
    return (folder / CONFIG_FILE).is_file()


def model_of_folder(folder: Path, *, name: str, vocab_multiple: int) -> ModelConfig:
    """The shape of the model in `folder`.

    Raises:
        UserError: config.json is missing, damaged, or has an unknown or unsupported key.
    """
    origin = folder / CONFIG_FILE
    return model_from_hugging_face(
        read_json(origin), name=name, vocab_multiple=vocab_multiple, origin=str(origin)
    )


class HuggingFaceWeights(SafetensorsFolder):
    """The tensors of `model` in `folder`.

    Raises:
        UserError: as `SafetensorsFolder`; tensors missing, too many, or of another shape than the model's.
    """

    def __init__(self, folder: Path, *, model: ModelConfig) -> None:
        super().__init__(folder, may_lack=partial(_is_dispensable, model))
        self._made = canonical_tensors(model)
        try:
            _check_tensors(self, model)
        except BaseException:
            self.close()
            raise

    @property
    def canonical(self) -> Mapping[str, Made]:
        """Canonical name -> which rows it is made of."""
        return self._made

    def read(self, name: str, *, offset: Ints, shape: Ints) -> torch.Tensor:
        """The part of the canonical tensor `name` that begins at `offset`, in fp32; rows of padding are zeros."""
        part = torch.zeros(shape)
        begin, end = offset[0], offset[0] + shape[0]
        columns = tuple(slice(o, o + s) for o, s in zip(offset[1:], shape[1:], strict=True))
        position = 0
        for rows in self._made[name].parts:
            low, high = max(begin, position), min(end, position + rows.count)
            if low < high:
                start = rows.start + low - position
                block = self.rows(rows.name, start=start, count=high - low, columns=columns)
                part[low - begin : high - begin] = block
            position += rows.count
        return part

    def fill(self, tensors: Mapping[str, BoxedTensor]) -> None:
        """Copies into the boxes with the key `fp32/<canonical name>`; other kinds are left as they are."""
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "fp32":
                for offset, view in tensor.boxes.items():
                    view.copy_(self.read(name, offset=offset, shape=tuple(view.shape)))

    @property
    def widest_dtype(self) -> str:
        """The format that holds every tensor exactly."""
        used = {dtype for name, dtype in self.dtypes.items() if not _BUFFERS.fullmatch(name)}
        chosen = used.pop() if len(used) == 1 else torch.float32
        return dtype_name(chosen)


def load_hugging_face(
    folder: Path,
    *,
    tensors: Mapping[str, BoxedTensor],
    model: ModelConfig,
    group: dist.ProcessGroup | None = None,
) -> dict[str, JSON]:
    """Fills the fp32 boxes of `tensors`, each rank's from the rows that it needs, and returns the folder's model.

    Called by every rank of `group`. Settings that hold no weights may differ from `model`.

    Raises:
        UserError: on every rank, where the folder is of another model, or damaged.
    """

    def fill() -> dict[str, JSON]:
        there = model_identity(model_of_folder(folder, name=model.name, vocab_multiple=model.vocab_multiple))
        check_model(folder, there, model_identity(model), may_differ=WITHOUT_WEIGHTS)
        with HuggingFaceWeights(folder, model=model) as weights, torch.no_grad():
            weights.fill(tensors)
        return there

    return Ranks(group).everywhere(fill)


def row_blocks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of parts of a bounded number of elements."""
    height = max(1, DEFAULT_CAP_ELEMENTS // width)
    return ((start, min(height, rows - start)) for start in range(0, rows, height))


def _is_dispensable(model: ModelConfig, name: str) -> bool:
    """Whether an index may name a tensor that no file holds: what writers leave out, as it says nothing of its own."""
    return (model.tie_embeddings and name == OUTPUT) or _BUFFERS.fullmatch(name) is not None


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
    for start, count in row_blocks(model.vocab_size, model.hidden_size):
        one, other = (weights.rows(name, start=start, count=count) for name in (EMBEDDING, OUTPUT))
        if not torch.equal(one, other):
            raise UserError(
                f"{weights.folder}: {OUTPUT} differs from {EMBEDDING} although tie_word_embeddings is true:"
                " set it to false in config.json to keep both"
            )
