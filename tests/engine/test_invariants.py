"""Copies that differ and gradients that are left over end the run, with the tensor and the ranks."""

from __future__ import annotations

import pytest
import torch

from megallama.engine.invariants import checksum
from tests.mutations.planted import MUTATIONS
from tests.support.gates import gated
from tests.support.jobs import overrides, run_job, train
from tests.support.ranks import run_ranks


def train_with(bug, arguments):
    MUTATIONS[bug]()
    return train(arguments)


@pytest.mark.parametrize(
    ("bug", "layout", "words"),
    [
        ("zero_0_does_not_reduce", ["zero.stage=0"], "replicas .* differ: .* on ranks .0, 1."),
        (
            "norm_weights_are_not_summed_over_tp",
            ["parallel.tp=2", "parallel.sequence_parallel=true"],
            "over tp differ",
        ),
        ("tied_copy_is_stale", ["parallel.pp=2", "model.tie_embeddings=true"], "tied weight differs"),
        ("gradients_are_left_over_on_a_later_stage", ["parallel.pp=2"], "rank 1: gradient of .* is not zero"),
    ],
)
def test_a_broken_run_ends_with_tensor_and_ranks(bug, layout, words, tmp_path):
    arguments = overrides(tmp_path, "train.check_invariants=true", *layout)
    with pytest.raises(AssertionError, match=f"(?s)InvariantError: before step 2:.*{words}"):
        run_ranks(2, train_with, bug, arguments)


@pytest.mark.parametrize("dtype", gated(["fp32", "bf16", "fp16"], gate={"bf16"}))
@pytest.mark.parametrize("stage", range(4))
def test_a_sound_run_goes_on_and_gives_the_same_numbers(stage, dtype, tmp_path):
    layout = [f"zero.stage={stage}", f"precision.dtype={dtype}", "train.steps=2", "optim.warmup_steps=0"]
    with_checks = run_job(tmp_path, 2, "train.check_invariants=true", *layout)
    assert with_checks == run_job(tmp_path, 2, *layout, run_name="unchecked")


def test_the_checksum_sees_one_bit_and_a_swap():
    values = torch.randn(10_000, dtype=torch.bfloat16)
    flipped, swapped = values.clone(), values.clone()
    flipped.view(torch.int16)[77] ^= 1
    swapped[[3, 4]] = swapped[[4, 3]]
    sums = [checksum(tensor).tolist() for tensor in (values, flipped, swapped, values.clone())]
    assert sums[0] == sums[3] and sums[0] != sums[1] and sums[0] != sums[2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
def test_every_format_has_a_checksum(dtype):
    tensor = torch.arange(100).to(dtype).view(10, 10)
    assert checksum(tensor).tolist() != checksum(tensor.T).tolist()
