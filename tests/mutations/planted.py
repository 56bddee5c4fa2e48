"""All planted bugs that `verify` is to notice."""

from __future__ import annotations

# Each adds its own to the registry.
from tests.mutations import context, gradients, host_memory, loss, weights
from tests.mutations.registry import MUTATIONS, SHOWS_IN

__all__ = ["MUTATIONS", "SHOWS_IN", "context", "gradients", "host_memory", "loss", "weights"]
