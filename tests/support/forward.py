"""Our own forward of a whole model in one process, to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megallama.checkpoint.offline.reader import CheckpointReader
from megallama.config.schema import RunConfig
from megallama.host.launch import LaunchEnvironment
from megallama.topology.connect import connect
from tests.support.builders import build_stage


@torch.no_grad()
def greedy_tokens(
    config: RunConfig, checkpoint: Path, prompts: Sequence[Sequence[int]], count: int
) -> list[list[int]]:
    """The likeliest tokens after each of `prompts`, each from a forward over all before it; of real ids only."""
    with connect(config.parallel, environment=LaunchEnvironment()) as topology:
        stage = build_stage(config, topology, is_initialized=False)
        reader = CheckpointReader(checkpoint)
        for name, parameter in stage.module.named_parameters():
            for piece in stage.layout[name]:
                part = reader.read(f"fp32/{piece.key}", offset=piece.offset, shape=piece.shape)
                parameter.view(-1)[piece.start : piece.start + part.numel()].copy_(part.flatten())
        continued = []
        for prompt in prompts:
            tokens = list(prompt)
            for _ in range(count):
                logits = stage.chunks[0].eval()(torch.tensor([tokens]), None, None)[0, -1]
                tokens.append(int(logits[: config.model.vocab_size].argmax()))
            continued.append(tokens[len(prompt) :])
    return continued
