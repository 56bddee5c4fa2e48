"""Which cases of a test `make test` runs; the others belong to `make test-long`."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def gated(cases: Iterable[Any], *, gate: Container[Any]) -> list[Any]:
    """All `cases` for `pytest.mark.parametrize`, those outside `gate` marked as long."""
    cases = list(cases)
    assert any(case in gate for case in cases), "no case is left in make test"
    return [case if case in gate else pytest.param(case, marks=pytest.mark.long) for case in cases]
