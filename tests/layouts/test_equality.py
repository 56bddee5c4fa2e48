"""Every layout computes what one process computes: the covering set of all pairs of settings, and those with a name.

Loss, gradient norm, every gradient and every weight, through `megallama verify`; `make matrix` runs all layouts.
"""

from __future__ import annotations

import pytest

from megallama.verification.verify import verify
from tests.layouts.matrix import base, covering
from tests.layouts.named import FURTHER, NAMED

pytestmark = pytest.mark.timeout(1800)


def differing(layouts, *, steps, dtype):
    """Layout, errors and likely cause of each that is not equal to one process; all move the bytes of the formula."""
    results = list(verify(base(), layouts, steps=steps, dtype=dtype))
    assert len(results) == len(layouts) > 0
    predicted = {r.layout.name: r.predicted_traffic for r in results if r.predicted_traffic is not None}
    # The formula leaves out one kind: how often stages fetch weights under ZeRO 3 is DeepSpeed's to decide.
    assert all(
        "pp=" in name and "zero=3" in name for name in {r.layout.name for r in results} - set(predicted)
    )
    assert {r.layout.name: r.traffic for r in results if r.layout.name in predicted} == predicted
    return [(result.layout.name, result.errors, result.cause) for result in results if not result.is_equal]


@pytest.mark.parametrize(
    ("dtype", "steps"),
    [
        ("fp64", 3),
        pytest.param("bf16", 3, marks=pytest.mark.long),
        pytest.param("fp32", 5, marks=pytest.mark.long),
    ],
)
def test_the_covering_set_equals_one_process(dtype, steps):
    assert differing(covering(), steps=steps, dtype=dtype) == []


@pytest.mark.parametrize("topic", NAMED)
def test_named_layouts_equal_one_process(topic):
    assert differing(NAMED[topic], steps=3, dtype="fp64") == []


@pytest.mark.long
@pytest.mark.parametrize("topic", FURTHER)
def test_further_layouts_equal_one_process(topic):
    assert differing(FURTHER[topic], steps=3, dtype="fp64") == []
