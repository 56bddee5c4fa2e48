"""What of a model decides whether a checkpoint is of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megallama.checkpoint.record import JSON
from megallama.config.check_files import NOT_OF_THE_SHAPE
from megallama.config.schema import ModelConfig
from megallama.config.typed import Problems, build, optional, plain
from megallama.host.errors import UserError


def model_facts(model: ModelConfig) -> dict[str, JSON]:
    """Settings of `model` that must agree for a checkpoint to be of it, as plain JSON."""
    settings: dict[str, JSON] = plain(model)
    return {key: value for key, value in settings.items() if key not in NOT_OF_THE_SHAPE}


def model_of_facts(facts: Mapping[str, JSON], *, name: str, max_seq_len: int) -> ModelConfig:
    """The model of a checkpoint: inverse of `model_facts`, with two settings that are no facts.

    Raises:
        UserError: the facts are not of this version.
    """
    problems = Problems()
    model = build(
        ModelConfig,
        {**facts, "name": name, "max_seq_len": max_seq_len},
        problems=problems,
        key="model",
        origin="the checkpoint",
    )
    if model is None or problems.messages or problems.missing:
        wrong = "; ".join([*problems.messages, *(f"{key} is missing" for key in problems.missing)])
        raise UserError(
            f"the checkpoint's model is not of this version ({wrong}): use the version that wrote it"
        )
    return model


def model_differences(stored: Mapping[str, JSON], wanted: Mapping[str, JSON]) -> list[str]:
    """One text a fact that differs, by name.

    A setting that a side lacks has its default (the program that wrote it knew no other), and null stands for what
    it means.
    """
    absent = "nothing"
    stored, wanted = _complete(stored), _complete(wanted)
    return [
        f"{key}: {stored.get(key, absent)} there, {wanted.get(key, absent)} here"
        for key in sorted(stored.keys() | wanted.keys())
        if stored.get(key, absent) != wanted.get(key, absent)
    ]


def _complete(facts: Mapping[str, JSON]) -> dict[str, JSON]:
    known = {key: value for key, value in optional(ModelConfig).items() if key not in NOT_OF_THE_SHAPE}
    whole = {**known, **facts}
    heads, width = whole.get("num_heads"), whole.get("hidden_size")
    if whole["num_kv_heads"] is None:
        whole["num_kv_heads"] = heads
    if whole["head_dim"] is None and isinstance(heads, int) and isinstance(width, int) and heads > 0:
        whole["head_dim"] = width // heads
    return whole


def check_model(path: Path, stored: Mapping[str, JSON], wanted: Mapping[str, JSON]) -> None:
    """Raise UserError, with the differing keys, where the checkpoint at `path` is of another model."""
    differences = model_differences(stored, wanted)
    if differences:
        raise UserError(
            f"checkpoint {path} is of another model ({'; '.join(differences)}):"
            " set these values as they are there, or choose another checkpoint"
        )
