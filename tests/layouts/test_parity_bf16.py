"""In bf16 a layout that cuts no matrix product computes what one process does, up to the order of fp32 sums.

dp, pp and ZeRO give the micro-batches' gradients to be summed in another order, and that is all. tp, sp and cp cut
products, whose parts are rounded to bf16 before they are summed; an embedding that is tied over stages is summed in
fp32 where one process adds its two gradients in bf16. These are held to bf16's own distance from fp32 by
tests/layouts/test_equality.py.
"""

import pytest

from tests.support.gates import gated
from tests.support.jobs import run_job

BF16 = ["precision.dtype=bf16"]
PP2, VP2 = "parallel.pp=2", "parallel.vp=2"
LAYOUTS = {
    **{f"dp2 zero{z}": (2, [f"zero.stage={z}"]) for z in range(4)},
    "pp2 zero1": (2, [PP2]),
    "pp2 vp2 zero2": (2, [PP2, VP2, "zero.stage=2"]),
    "dp2 pp2 zero3": (4, [PP2, "zero.stage=3"]),
    "recompute full": (1, ["train.recompute=full"]),
}
FP32_SUMS = 1e-6
"""Eight micro-batches in another order: all that may differ in a first step."""
BF16_STEPS = 2e-3
"""Later steps: a master weight that an fp32 sum moved over a rounding border differs by one bf16 step, 2**-8 of it."""


@pytest.mark.parametrize("name", gated(LAYOUTS, gate={"dp2 zero2", "pp2 vp2 zero2", "dp2 pp2 zero3"}))
def test_first_step_differs_by_the_order_of_sums_only(name, oracle, tmp_path):
    world_size, extra = LAYOUTS[name]
    wanted, got = oracle([*extra, *BF16]), run_job(tmp_path, world_size, *extra, *BF16)
    (loss, norm), (loss_one, norm_one) = got[0], wanted[0]
    assert abs(loss / loss_one - 1) <= FP32_SUMS, (loss, loss_one)
    assert abs(norm / norm_one - 1) <= FP32_SUMS, (norm, norm_one)
    for (loss, norm), (loss_one, norm_one) in zip(got, wanted, strict=True):
        assert abs(loss / loss_one - 1) <= BF16_STEPS and abs(norm / norm_one - 1) <= 10 * BF16_STEPS


def test_fp32_is_another_number(oracle):
    """The bound of the first step is far below what bf16 itself does, so it cannot pass by being loose."""
    (loss, norm), (loss_fp32, norm_fp32) = oracle(BF16)[0], oracle([])[0]
    # A loss is a mean over many tokens, whose roundings may all but cancel on one machine and not on another.
    assert loss != loss_fp32 and abs(norm / norm_fp32 - 1) > 5 * FP32_SUMS
