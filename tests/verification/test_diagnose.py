"""From patterns of differences to likely causes."""

from __future__ import annotations

import dataclasses
import math

import pytest

from megallama.engine.step import StepResult
from megallama.grid import Coordinates
from megallama.verification.compare import compare
from megallama.verification.diagnose import is_equal, likely_cause
from megallama.verification.job import GRADIENT, PARAMETER, Difference, RankReport
from megallama.verification.layouts import parse_layouts
from megallama.verification.verify import TOLERANCES
from tests.layouts.matrix import base

KEYS = (
    "embedding.word_embeddings.weight",
    "decoder.layers.0.input_layernorm.weight",
    "decoder.layers.1.mlp.linear_fc2.weight",
)
STEP = StepResult(loss=4.0, grad_norm=2.0, lr=1e-3, num_tokens=100, loss_scale=1.0, is_skipped=False)


def part(kind, key, rank, *, ratio=1.0, error=None, rest=0.0):
    error = abs(ratio - 1) if error is None else error
    return Difference(kind, key, rank, error, ratio, rest, elements=5, total=10)


def reports(change=lambda difference: difference, *, steps=(STEP, STEP), broken=""):
    """Two tp ranks that agree with one process, but for `change`."""
    return [
        RankReport(
            place=Coordinates(tp=rank, cp=0, dp=0, pp=0),
            steps=list(steps),
            differences=[change(part(kind, key, rank)) for kind in (GRADIENT, PARAMETER) for key in KEYS],
            traffic={},
            keys=KEYS,
            broken=broken,
        )
        for rank in range(2)
    ]


REFERENCE = reports()[0]


def verdict(got, layout="tp=2"):
    (layout,) = parse_layouts(layout)
    found = compare(got, REFERENCE, keys=KEYS)
    if is_equal(found, TOLERANCES["fp64"]):
        return None
    return likely_cause(found, layout.apply(base()), dp=layout.dp, tolerances=TOLERANCES["fp64"])


def gradients(where, **changes):
    """A change of the gradients whose name holds `where`."""
    return lambda d: dataclasses.replace(d, **changes) if d.kind == GRADIENT and where in d.key else d


def test_equal_reports_are_equal():
    assert verdict(reports()) is None


@pytest.mark.parametrize(
    ("layout", "ratio", "words"), [("tp=2", 2.0, "tp (2)"), ("dp=4", 0.25, "1 / dp (4)")]
)
def test_a_common_factor_is_named(layout, ratio, words):
    got = reports(
        gradients("", ratio=ratio, error=abs(ratio - 1)),
        steps=(dataclasses.replace(STEP, grad_norm=2 * ratio),) * 2,
    )
    text = verdict(got, layout)
    assert "every gradient is off by a factor" in text and words in text


def test_norm_weights_alone_point_to_the_sum_over_tp():
    text = verdict(reports(gradients("norm", error=0.3, rest=0.3)))
    assert "sum over tp of norm weights is missing" in text and "input_layernorm" in text


def test_one_rank_alone_is_named():
    text = verdict(reports(lambda d: gradients("fc2", error=0.3, rest=0.3)(d) if d.rank == 1 else d))
    assert "only on tp rank 1" in text and "linear_fc2" in text


def test_a_norm_alone_counts_too_much_or_too_little():
    steps = (dataclasses.replace(STEP, grad_norm=2.2),) * 2
    assert "their norm is 1.1 times" in verdict(reports(steps=steps))


def test_a_wrong_first_loss_is_the_forward():
    assert "the forward differs" in verdict(reports(steps=(dataclasses.replace(STEP, loss=4.1), STEP)))
    assert "factor of tp (2)" in verdict(reports(steps=(dataclasses.replace(STEP, loss=8.0), STEP)))


def test_a_difference_from_the_second_step_on_is_the_update():
    steps = (STEP, dataclasses.replace(STEP, loss=4.001))
    assert "step 2 does not" in verdict(reports(steps=steps))


def test_weights_alone_are_the_update():
    change = lambda d: dataclasses.replace(d, error=0.1) if d.kind == PARAMETER and "norm" in d.key else d  # noqa: E731
    assert "losses agree, weights do not" in verdict(reports(change))


def test_what_no_rank_holds_is_missing():
    got = [
        dataclasses.replace(r, differences=[d for d in r.differences if "fc2" not in d.key])
        for r in reports()
    ]
    assert "no rank updates gradient of decoder.layers.1.mlp.linear_fc2.weight" in verdict(got)


def test_what_is_no_number_never_passes():
    got = reports(gradients("fc2", error=math.inf))
    assert "not a number" in verdict(got)
    assert verdict(reports(steps=(dataclasses.replace(STEP, loss=math.nan), STEP))) is not None


def test_broken_invariants_never_pass():
    assert verdict(reports(broken="before step 2: copies differ")) is not None
