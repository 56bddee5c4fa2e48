"""Text generation from a run folder or an import, in one process, whatever layout the model was trained in."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megallama.checkpoint.format.integrity import latest_checkpoint
from megallama.checkpoint.format.protocol import read_manifest
from megallama.checkpoint.offline.reader import CheckpointReader
from megallama.config.load import load_model_yaml, load_yaml
from megallama.config.schema import (
    Dtype,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RopeScaling,
    RunConfig,
    TrainConfig,
    ZeroConfig,
)
from megallama.host.errors import UserError
from megallama.host.launch import single_process
from megallama.model.build import Stage, build_model
from megallama.tokenizers.load import Tokenizer, load_tokenizer
from megallama.topology.connect import connect
from megallama.trainer.run_folder import TOKENIZER_NAMES, RunFolder

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability (Holtzman et al. 2020, arXiv:1904.09751)."""
    seed: int = 0
    """Seed of the draw."""

    def check(self) -> None:
        """Raise UserError for values that make no sense."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(
                f"--temperature ({self.temperature}) must be 0 or more: 0 is greedy decoding,"
                " 1 samples from the model's distribution"
            )
        if self.top_k < 0:
            raise UserError(
                f"--top-k ({self.top_k}) must not be negative: give 0 for all tokens,"
                " or the number of most likely tokens to keep"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p ({self.top_p}) must be in (0, 1]: 1 keeps all tokens")


@contextmanager
def open_run(run_dir: Path) -> Iterator[tuple[RunConfig, Stage, Tokenizer]]:
    """The whole model of a run's newest checkpoint that verifies, or of an import, in this process, and its tokenizer.

    Raises:
        UserError: the folder is neither, or holds no checkpoint or tokenizer.
    """
    folder = RunFolder(run_dir)
    is_run = folder.config_file.is_file()
    trained = load_yaml(folder.config_file) if is_run else _config_of_import(folder)
    tokenizer_file = folder.tokenizer_file()
    if tokenizer_file is None:
        remedy = (
            "set data.tokenizer in the run and continue it"
            if is_run
            else f"copy the model's {' or '.join(TOKENIZER_NAMES)} to {folder.tokenizer_folder}"
        )
        raise UserError(f"{run_dir} holds no tokenizer: {remedy}")
    tokenizer = load_tokenizer(tokenizer_file)
    checkpoint = latest_checkpoint(folder.checkpoints, log=log.warning)
    if checkpoint is None:
        raise UserError(
            f"{folder.checkpoints} holds no usable checkpoint: train for at least one checkpoint.interval"
        )
    if not is_run:
        trained = dataclasses.replace(trained, precision=PrecisionConfig(dtype=_format_of_import(checkpoint)))
    config = dataclasses.replace(trained, parallel=ParallelConfig(), zero=ZeroConfig(stage=0))
    environment = single_process("megallama generate")
    with connect(config.parallel, environment=environment) as topology:
        stage = build_model(
            config.model,
            topology=topology,
            parallel=config.parallel,
            precision=config.precision,
            train=config.train,
            kernels=config.kernels,
            is_initialized=False,
        )
        fill_stage(stage, checkpoint)
        stage.module.to(topology.device).eval()
        yield config, stage, tokenizer


def _config_of_import(folder: RunFolder) -> RunConfig:
    """What `megallama import` says of its model, where there was no run that would have a configuration."""
    shapes = sorted((folder.path / "conf" / "model").glob("*.yaml"))
    if len(shapes) != 1 or not folder.checkpoints.is_dir():
        raise UserError(
            f"{folder.path} is not a run folder (no config.yaml): give the train.run_dir of a run, or a folder that"
            " `megallama import` made"
        )
    model = load_model_yaml(shapes[0])
    # Dynamic NTK raises the base by what seq_len exceeds this: a prompt begins with the plain one.
    is_dynamic = model.rope_scaling is RopeScaling.dynamic
    seq_len = min(model.max_seq_len, model.rope_original_max_seq_len) if is_dynamic else model.max_seq_len
    return RunConfig(
        model=model,
        train=TrainConfig(steps=1, run_dir=str(folder.path), seq_len=seq_len, global_batch_size=1),
        optim=OptimConfig(lr=0.0),
    )


def _format_of_import(checkpoint: Path) -> Dtype:
    """The format that the weights had where they came from."""
    source = read_manifest(checkpoint).state.get("source")
    name = source.get("dtype") if isinstance(source, dict) else None
    return next((kind for kind in Dtype if kind.full_name == name), Dtype.fp32)


@torch.no_grad()
def fill_stage(stage: Stage, checkpoint: Path) -> None:
    """Copy canonical master weights into the stage's parameters, one tensor in memory at a time."""
    parameters = dict(stage.module.named_parameters())
    places = {piece.key: (name, piece) for name, pieces in stage.layout.items() for piece in pieces}
    for key, tensor in CheckpointReader(checkpoint, verify="never").read_all():
        name, piece = places.pop(key)
        flat = parameters[name].view(-1)
        flat[piece.start : piece.start + tensor.numel()].copy_(tensor.reshape(-1))
    assert not places, f"the checkpoint lacks {sorted(places)}"


@torch.no_grad()
def continue_tokens(
    config: RunConfig,
    stage: Stage,
    tokens: list[int],
    *,
    eod_id: int,
    max_new_tokens: int,
    sampling: Sampling,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """New token ids below `vocab_size` (default: the model's), one by one, until a document ends or `max_new_tokens`.

    The whole window is computed anew for each token: sampling for a look at the model, not for serving.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    device = next(stage.module.parameters()).device
    tokens = list(tokens) or [eod_id]
    for _ in range(max_new_tokens):
        window = torch.tensor([tokens[-config.train.seq_len :]], device=device)
        logits_BSV = stage.chunks[0](window, None, None)
        # Rows beyond the vocabulary are padding of the embedding, or spare ids that no tokenizer can show.
        logits_V = logits_BSV[0, -1, : vocab_size or config.model.vocab_size].float().cpu()
        token = choose_token(logits_V, sampling, generator)
        if token == eod_id:
            return
        tokens.append(token)
        yield token


def choose_token(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id drawn from `logits_V` [vocabulary] as `sampling` says."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    ordered_V, ids_V = (logits_V / sampling.temperature).sort(descending=True, stable=True)
    if sampling.top_k:
        ordered_V, ids_V = ordered_V[: sampling.top_k], ids_V[: sampling.top_k]
    probability_V = ordered_V.softmax(-1)
    if sampling.top_p < 1:
        # The token that crosses top_p still belongs to the set, so that it is never empty.
        before_V = probability_V.cumsum(-1) - probability_V
        probability_V = probability_V.where(before_V < sampling.top_p, 0)
    return int(ids_V[torch.multinomial(probability_V, 1, generator=generator)])


def generate(
    run_dir: Path, prompt: str, *, max_new_tokens: int = 200, sampling: Sampling | None = None
) -> Iterator[str]:
    """Text that continues `prompt`, in parts as they become whole characters."""
    sampling = sampling or Sampling()
    sampling.check()
    if max_new_tokens < 1:
        raise UserError(
            f"--max-new-tokens ({max_new_tokens}) must be at least 1: give how many tokens to add"
        )
    with open_run(run_dir) as (config, stage, tokenizer):
        ids = tokenizer.encode(prompt)
        shown = tokenizer.decode(ids)
        new = continue_tokens(
            config,
            stage,
            ids,
            eod_id=tokenizer.eod_id,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            vocab_size=min(tokenizer.vocab_size, config.model.vocab_size),
        )
        for token in new:
            ids.append(token)
            text = tokenizer.decode(ids)
            # A character of several byte tokens (Chinese, often) decodes to U+FFFD until it is complete.
            if text.endswith("\ufffd"):
                continue
            yield text[len(shown) :]
            shown = text
