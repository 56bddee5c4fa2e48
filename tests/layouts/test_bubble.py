"""The schedule that runs has the bubble that theory gives it."""

import pytest

from benchmarks.pipeline_bubble import LAYOUTS, bubble, theory


@pytest.mark.parametrize(("pp", "vp", "micro_batches"), [*LAYOUTS, (3, 1, 2), (4, 1, 3)])
def test_the_bubble_is_that_of_theory(pp, vp, micro_batches):
    got = bubble(pp, vp, micro_batches, forward_s=1.0, backward_s=2.0, is_virtual=True)
    assert got == pytest.approx(theory(pp, vp, micro_batches), rel=1e-6)
