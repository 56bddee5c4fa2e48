"""Builds the loader of one rank. Middle pipeline stages read only document starts, no tokens."""

from __future__ import annotations

from megallama.config.schema import RunConfig
from megallama.grid import num_micro_batches
from megallama.stream.loader import DataLoader, open_loader
from megallama.topology.groups import Topology


def build_loader(config: RunConfig, topology: Topology) -> DataLoader:
    """The loader of this rank.

    Raises:
        ConfigError: missing or damaged files, or a vocabulary larger than the model's.
        UserError: a source too short for one sample.
    """
    return open_loader(
        config,
        dp_rank=topology.dp_rank,
        dp_size=topology.grid.dp,
        num_micro_batches=num_micro_batches(
            config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            dp=topology.grid.dp,
        ),
        cp_rank=topology.cp_rank,
        is_reading_tokens=topology.is_first_stage or topology.is_last_stage,
    )
