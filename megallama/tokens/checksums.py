"""Compares every byte of prepared files with the checksums of their manifests. Imports no torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from megallama.tokens.manifest import check_token_file, read_manifest, shard_prefixes

_BLOCK_BYTES = 4 << 20


def compare_checksums(prefix: str | Path, problems: list[str]) -> Iterator[int]:
    """Read all files at `prefix`, shards too; yields bytes as they are read, and adds what is wrong to `problems`.

    Files without a manifest, as Megatron makes them, have nothing to be compared with and are not read.
    """
    found = check_token_file(prefix)
    problems += found
    for shard in [] if found else shard_prefixes(prefix):
        manifest = read_manifest(shard)
        if manifest is None:
            continue
        for suffix, stated in ((".bin", manifest.bin_sha256), (".idx", manifest.idx_sha256)):
            digest = hashlib.sha256()
            try:
                with open(f"{shard}{suffix}", "rb") as stream:
                    while block := stream.read(_BLOCK_BYTES):
                        digest.update(block)
                        yield len(block)
            except OSError as error:
                problems.append(
                    f"{shard}{suffix} cannot be read ({error.strerror}): copy or prepare it again"
                )
                continue
            if digest.hexdigest() != stated:
                problems.append(
                    f"{shard}{suffix} is not what was prepared (sha256 {digest.hexdigest()[:12]}..., its manifest"
                    f" says {stated[:12]}...): copy or prepare it again"
                )


def compared_bytes(prefix: str | Path) -> int:
    """How much `compare_checksums` reads; 0 where there is nothing to compare with."""
    if check_token_file(prefix):
        return 0
    shards = [shard for shard in shard_prefixes(prefix) if read_manifest(shard) is not None]
    return sum(os.path.getsize(f"{shard}{suffix}") for shard in shards for suffix in (".bin", ".idx"))
