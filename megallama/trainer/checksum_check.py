"""`data.verify_checksums`: rank 0 reads all data before the first step, and the other ranks wait for the result."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from megallama.config.schema import DataConfig
from megallama.host.errors import ConfigError
from megallama.stream.open import source_paths
from megallama.tokens.checksums import compare_checksums, compared_bytes
from megallama.topology.agreement import Ranks
from megallama.topology.groups import Topology

log = logging.getLogger(__name__)

_BYTES_BETWEEN_SIGNS = 8 << 30


def check_checksums(data: DataConfig, topology: Topology) -> None:
    """That the data is what was prepared, where the configuration asks for it.

    Raises:
        UserError: some file differs from its checksum; the same on every rank.
    """
    if not data.verify_checksums:
        return
    ranks = Ranks(topology.host_group)
    reading = _read(data)
    # A sign of life now and then, so that no wait for a corpus of any size is a timeout.
    while ranks.first(lambda: next(reading, None)) is not None:
        pass


def _read(data: DataConfig) -> Iterator[int]:
    """Bytes read so far, every few seconds."""
    problems: list[str] = []
    sizes = {path: compared_bytes(path) for path in source_paths(data)}
    log.info(
        "comparing %.1f GB of data with their checksums (data.verify_checksums)", sum(sizes.values()) / 1e9
    )
    done = unsaid = 0
    for path, size in sizes.items():
        for count in compare_checksums(path, problems):
            done, unsaid = done + count, unsaid + count
            if unsaid >= _BYTES_BETWEEN_SIGNS:
                log.info("%.0f of %.0f GB compared", done / 1e9, sum(sizes.values()) / 1e9)
                unsaid = 0
                yield done
        if not size and not problems:
            log.warning("%s has no manifest: there is nothing to compare it with", path)
    if problems:
        raise ConfigError(problems)
    log.info("all data is as it was prepared")
