"""Builds the loader of one rank. Middle pipeline stages read only document starts, no tokens."""

from __future__ import annotations

from megallama.batches.micro_batch import rank_part
from megallama.config.schema import DataConfig, EvalConfig, TrainConfig
from megallama.stream.loader import DataLoader, open_loader
from megallama.topology.groups import Topology


def build_loader(
    data: DataConfig, *, topology: Topology, train: TrainConfig, evaluation: EvalConfig, vocab_size: int
) -> DataLoader:
    """The loader of this rank.

    Args:
        data: Token files, their shares, and what of them counts in the loss.
        topology: Place of this rank.
        train: Sizes and length of the run.
        evaluation: How much is evaluated on.
        vocab_size: Token ids of the model.

    Raises:
        ConfigError: missing or damaged files, or a vocabulary larger than the model's.
        UserError: a source too short for one sample.
    """
    part = rank_part(topology, train)
    return open_loader(data, train=train, vocab_size=vocab_size, evaluation=evaluation, part=part)
