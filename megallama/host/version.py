"""Which version of this package is installed."""

from __future__ import annotations

import importlib.metadata


def version() -> str:
    """As setup.py gives it; without an installation there is none."""
    try:
        return importlib.metadata.version("megallama")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
