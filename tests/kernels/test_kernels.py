"""Each fused kernel against its plain form, values and gradients."""

import pytest
import torch

from megallama.host.errors import UserError
from megallama.kernels.norm import choose_norm, rms_norm_reference, rms_norm_torch
from megallama.kernels.swiglu import swiglu, swiglu_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.5e-2}


def outputs_and_gradients(function, *inputs):
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    (out * weight).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def worst_error(got, wanted):
    return max(
        float((g.double() - w.double()).norm() / w.double().norm()) for g, w in zip(got, wanted, strict=True)
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rms_norm_equals_reference(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, 32, dtype=torch.float64), torch.randn(32, dtype=torch.float64)
    wanted = outputs_and_gradients(lambda *t: rms_norm_reference(*t, 1e-5), x, weight)
    got = outputs_and_gradients(lambda *t: rms_norm_torch(*t, 1e-5), x.to(dtype), weight.to(dtype))
    assert worst_error(got, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swiglu_equals_reference(dtype):
    torch.manual_seed(0)
    gate_up = torch.randn(3, 5, 32, dtype=torch.float64)
    wanted = outputs_and_gradients(swiglu_reference, gate_up)
    got = outputs_and_gradients(swiglu, gate_up.to(dtype))
    assert worst_error(got, wanted) < TOLERANCE[dtype]


def test_auto_prefers_fused_and_explicit_is_kept():
    assert choose_norm("auto") == ("torch", rms_norm_torch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="apex may run on CUDA")
def test_explicit_apex_that_cannot_run_is_an_error():
    with pytest.raises(UserError, match=r"kernels.norm \(apex\) cannot run.*kernels.norm=auto"):
        choose_norm("apex")
