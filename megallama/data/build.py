"""The loader of one rank: tokens on the first and last pipeline stage, nothing between them."""

from __future__ import annotations

from collections.abc import Sequence

from megallama.config.schema import RunConfig
from megallama.data.loader import DataLoader, MicroBatch, open_loader
from megallama.grid import num_micro_batches
from megallama.topology.groups import Topology


def build_loader(config: RunConfig, topology: Topology) -> DataLoader | TokenlessLoader:
    """The loader of this rank.

    Raises:
        ConfigError: missing or damaged files, or a vocabulary larger than the model's.
        UserError: a source too short for one sample.
    """
    per_rank = num_micro_batches(
        config.train.global_batch_size, micro_batch_size=config.train.micro_batch_size, dp=topology.grid.dp
    )
    loader = open_loader(
        config, dp_rank=topology.dp_rank, dp_size=topology.grid.dp, num_micro_batches=per_rank
    )
    if topology.is_first_stage or topology.is_last_stage:
        return loader
    return TokenlessLoader(loader, num_micro_batches=per_rank)


class TokenlessLoader:
    """As many batches as a loader gives, without reading one: the middle stages only pass activations on."""

    def __init__(self, loader: DataLoader, *, num_micro_batches: int) -> None:
        self._num_validation_batches = loader.num_validation_batches
        self._micro_batches: list[MicroBatch | None] = [None] * num_micro_batches
        loader.close()

    def batches(self, step: int) -> Sequence[MicroBatch | None]:
        """The placeholders of a step's micro-batches."""
        return self._micro_batches

    def validation_batches(self) -> Sequence[Sequence[MicroBatch | None]]:
        """The placeholders of an evaluation."""
        return [self._micro_batches] * self._num_validation_batches

    def close(self) -> None:
        """Nothing is open."""
