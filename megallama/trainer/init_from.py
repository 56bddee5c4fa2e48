"""`train.init_from`: which paths it accepts, and what is wrong with a given one."""

from __future__ import annotations

from pathlib import Path

from megallama.checkpoint.format.model_identity import model_differences, model_identity
from megallama.checkpoint.format.protocol import (
    check_sizes,
    checkpoints_below,
    find_checkpoints,
    is_checkpoint,
    is_complete,
    read_index,
    read_manifest,
)
from megallama.checkpoint.format.record import JSON, damage_at
from megallama.config.same_model import WITHOUT_WEIGHTS
from megallama.config.schema import ModelConfig
from megallama.host.errors import UserError
from megallama.huggingface.weights import HuggingFaceWeights, is_hugging_face, model_of_folder


def source_problems(path: Path, *, model: ModelConfig, own: Path) -> list[str]:
    """Why a run of `model` cannot start from the weights at `path`; none where it can, or need not.

    Data files are not digested, every rank may call this at once; loading does it.

    Args:
        path: A checkpoint, a run folder, or the folder of a Hugging Face model.
        model: The model of the run.
        own: The run's own checkpoints, which go before.
    """
    if find_checkpoints(own):
        return []
    try:
        stored = (
            _identity_of_folder(path, model)
            if is_hugging_face_source(path)
            else _identity_of_checkpoint(path)
        )
    except UserError as error:
        return [f"train.init_from ({path}): {error}"]
    except OSError as error:
        return [f"train.init_from ({path}) cannot be read ({error.strerror}): check its permissions"]
    differences = model_differences(stored, model_identity(model), may_differ=WITHOUT_WEIGHTS)
    if differences:
        return [
            f"train.init_from ({path}) holds another model ({'; '.join(differences)}):"
            " set these values as the checkpoint has them, or choose another checkpoint"
        ]
    return []


def is_hugging_face_source(path: Path) -> bool:
    """Whether `path` names a Hugging Face model rather than checkpoints, which go before."""
    return is_hugging_face(path) and not is_checkpoint(path) and not checkpoints_below(path)


def _identity_of_checkpoint(path: Path) -> dict[str, JSON]:
    checkpoint = _candidate(path)
    with damage_at(checkpoint):
        manifest = read_manifest(checkpoint)
        check_sizes(checkpoint, manifest)
        read_index(checkpoint, manifest)
    return manifest.model


def _identity_of_folder(path: Path, model: ModelConfig) -> dict[str, JSON]:
    there = model_of_folder(path, name=model.name, vocab_multiple=model.vocab_multiple)
    with HuggingFaceWeights(path, model=there):
        return model_identity(there)


def _candidate(path: Path) -> Path:
    """The checkpoint itself, or the newest of a run folder whose files are all there."""
    if is_checkpoint(path):
        return path
    paths = checkpoints_below(path)[::-1]
    if paths:
        return next((candidate for candidate in paths if is_complete(candidate)), paths[0])
    raise UserError(
        "there is no checkpoint: give a step-... directory, the train.run_dir of a run, or a Hugging Face folder"
    )
