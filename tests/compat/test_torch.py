"""What is private or replaced in torch: still there, and still needed."""

import importlib
import inspect

import pytest
import torch

from megallama.compat import torch as compat

OPERATORS = [name for name in vars(compat) if name.startswith(("cpu_", "cuda_"))]


def test_the_version_is_the_one_that_was_read():
    assert torch.__version__.split("+")[0] == compat.VERSION, "read compat/torch.py against the new version"


def test_the_public_attention_returns_no_log_sum_exp():
    x = torch.zeros(1, 1, 2, 8)
    assert torch.is_tensor(torch.nn.functional.scaled_dot_product_attention(x, x, x)), (
        "use it for the forward"
    )
    out, lse = compat.cpu_flash_forward(x, x, x, 0.0, False)
    assert out.shape == x.shape and lse.shape == (1, 1, 2)


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_there(name):
    assert getattr(compat, name).overloads(), name


def test_float_narrows_and_megatron_core_asks_for_it():
    cross_entropy = importlib.import_module("megatron.core.tensor_parallel.cross_entropy")
    assert ".float()" in inspect.getsource(cross_entropy), "it keeps the format: drop keep_double"
    wide, narrow = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.bfloat16)
    assert wide.float().dtype == torch.float32, "float() leaves fp64 alone: drop keep_double"
    compat.keep_double(True)
    try:
        assert wide.float().dtype == torch.float64 and narrow.float().dtype == torch.float32
    finally:
        compat.keep_double(False)
    assert wide.float().dtype == torch.float32
