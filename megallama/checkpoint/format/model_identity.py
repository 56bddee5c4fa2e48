"""The identity of a model: the settings that must agree for a checkpoint to be loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from megallama.checkpoint.format.record import JSON
from megallama.config.same_model import NOT_OF_THE_SHAPE, differing_settings
from megallama.config.schema import ModelConfig
from megallama.config.typed import Problems, build, plain
from megallama.host.errors import UserError


def model_identity(model: ModelConfig) -> dict[str, JSON]:
    """Settings of `model` that must agree for a checkpoint to be of it, as plain JSON."""
    settings: dict[str, JSON] = plain(model)
    return {key: value for key, value in settings.items() if key not in NOT_OF_THE_SHAPE}


def model_of_identity(identity: Mapping[str, JSON], *, name: str, max_seq_len: int) -> ModelConfig:
    """The model of a checkpoint: inverse of `model_identity`, with the two settings that it leaves out.

    Raises:
        UserError: the identity is not of this version.
    """
    problems = Problems()
    model = build(
        ModelConfig,
        {**identity, "name": name, "max_seq_len": max_seq_len},
        problems=problems,
        key="model",
        origin="the checkpoint",
    )
    if model is None or problems.messages or problems.missing:
        wrong = "; ".join([*problems.messages, *(f"{key} is missing" for key in problems.missing)])
        raise UserError(
            f"the checkpoint's model is not valid in this version of megallama ({wrong}):"
            " use the version that wrote it"
        )
    return model


def model_differences(
    stored: Mapping[str, JSON], wanted: Mapping[str, JSON], *, may_differ: Collection[str] = ()
) -> list[str]:
    """One text a fact that differs, by name, beside those of `may_differ`; `differing_settings` says what counts."""
    return [
        f"{key}: {there} there, {here} here"
        for key, (there, here) in differing_settings(stored, wanted).items()
        if key not in may_differ
    ]


def check_model(
    path: Path, stored: Mapping[str, JSON], wanted: Mapping[str, JSON], *, may_differ: Collection[str] = ()
) -> None:
    """Raise UserError, with the differing keys, where the checkpoint at `path` is of another model."""
    differences = model_differences(stored, wanted, may_differ=may_differ)
    if differences:
        raise UserError(
            f"checkpoint {path} is of another model ({'; '.join(differences)}):"
            " set these values as the checkpoint has them, or choose another checkpoint"
        )
