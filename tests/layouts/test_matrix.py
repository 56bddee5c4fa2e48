"""The covering set of layouts (every pair of settings) equals one process; `make matrix` runs all layouts."""

from __future__ import annotations

import pytest

from megallama.verify.verify import verify
from tests.layouts.matrix import base, covering

pytestmark = pytest.mark.timeout(1800)


@pytest.mark.parametrize("dtype", ["fp64", "bf16", pytest.param("fp32", marks=pytest.mark.long)])
def test_the_covering_set_equals_one_process(dtype):
    results = list(verify(base(), covering(), steps=5, dtype=dtype))
    wrong = [(result.layout.name, result.errors, result.cause) for result in results if not result.is_equal]
    assert not wrong, wrong
