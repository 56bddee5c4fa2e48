"""Kernels over parts of the keys: each against the formulas, and CUDA's calls by their shapes, without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megallama.kernels.attention import context_parallel as attention_context
from megallama.kernels.attention import fused
from megallama.kernels.attention.context_parallel import WholeKeysAttention
from megallama.kernels.attention.fused import CpuFlash, CudaEfficient, CudaFlash, Reference, choose_kernel
from megallama.kernels.attention.plan import Block, plan_whole_keys
from tests.kernels.attention.attention_on_ranks import worst_error


@pytest.mark.parametrize(("queries", "keys", "is_causal"), [(24, 24, True), (8, 24, False), (24, 8, False)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cpu_flash_equals_the_formulas(queries, keys, is_causal, kv_heads):
    torch.manual_seed(0)
    q, grad = (torch.randn(2, 4, queries, 16, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(2, kv_heads, keys, 16, dtype=torch.float64) for _ in range(2))
    options = {"is_causal": is_causal, "scale": 0.3}
    got, wanted = (kernel.forward(q, k, v, **options) for kernel in (CpuFlash(), Reference()))
    assert worst_error(list(got[:2]), list(wanted[:2])) < 1e-12
    # As if these keys were some of many: the log-sum-exp and the output are those over all of them.
    out, lse = got[0] + 0.1, got[1] + 0.5
    gradients = [
        kernel.backward(grad, q, k, v, out, lse, None, **options) for kernel in (CpuFlash(), Reference())
    ]
    assert worst_error(*map(list, gradients)) < 1e-12


def test_reference_equals_autograd():
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(1, 2, 6, 4, dtype=torch.float64) for _ in range(4))
    out, lse, _ = Reference().forward(q, k, v, is_causal=True, scale=0.3)
    got = Reference().backward(grad, q, k, v, out, lse, None, is_causal=True, scale=0.3)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    score = (leaves[0] @ leaves[1].transpose(-1, -2) * 0.3).masked_fill(
        torch.ones(6, 6, dtype=torch.bool).triu(1), float("-inf")
    )
    (score.softmax(-1) @ leaves[2]).backward(grad)
    assert worst_error(list(got), [leaf.grad for leaf in leaves]) < 1e-12


@pytest.mark.parametrize(
    ("dtype", "width", "capability", "kernel"),
    [
        (torch.bfloat16, 128, (9, 0), CudaFlash),
        (torch.float16, 256, (8, 0), CudaFlash),
        (torch.float16, 128, (7, 5), CudaEfficient),
        (torch.bfloat16, 264, (9, 0), CudaEfficient),
        (torch.float32, 128, (9, 0), CudaEfficient),
        (torch.float64, 128, (9, 0), Reference),
    ],
)
def test_each_device_and_precision_has_its_kernel(dtype, width, capability, kernel, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        like = torch.empty(1, width, device="cuda", dtype=dtype)
        assert isinstance(choose_kernel("sdpa", like), kernel)
        assert isinstance(choose_kernel("reference", like), Reference)


def test_queries_that_are_none_have_an_infinite_sum(monkeypatch):
    """Memory-efficient attention takes the log-sum-exp in rows of 32, and reads no length beside it."""
    taken = []

    def backward(grad, q, k, v, bias, out, lse, *rest, scale):
        taken.append(lse)
        return q, k, v, None

    monkeypatch.setattr(fused.torch_compat, "cuda_efficient_backward", backward)
    x, lse = torch.ones(1, 2, 40, 8), torch.ones(1, 2, 40)
    CudaEfficient().backward(x, x, x, x, x, lse, (None, None), is_causal=True, scale=1.0)
    (padded,) = taken
    assert padded.shape == (1, 2, 64) and padded.is_contiguous()
    assert torch.equal(padded[..., :40], lse) and bool(padded[..., 40:].isposinf().all())


def test_a_plan_goes_to_the_gpu_without_waiting_for_it(monkeypatch):
    """A plan is made for every micro-batch, while the GPU is still at the one before."""
    sent, device = [], torch.device("cuda", 0)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: sent.append("locked") or tensor)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, device, non_blocking=False: sent.append(non_blocking) or tensor
    )
    plan_whole_keys.__wrapped__(Block(((0, 3, 40),), 1, 48, 1, 0, True, device))
    assert sent == ["locked", True] * 4


def test_the_cpu_has_its_kernel():
    assert isinstance(choose_kernel("sdpa", torch.empty(1)), CpuFlash)


class Context:
    """What autograd gives a function; here its two halves are called by hand."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


@pytest.mark.parametrize(
    ("kernel_type", "dtype"), [(CudaFlash, torch.bfloat16), (CudaEfficient, torch.float32)]
)
@pytest.mark.parametrize("width", [64, 20])
@pytest.mark.parametrize("documents", [None, ((0, 3, 40), (0, 7))])
@pytest.mark.parametrize("cp_size", [1, 2])
def test_cuda_calls_fit_their_operators(kernel_type, dtype, width, documents, cp_size, monkeypatch):
    monkeypatch.setattr(attention_context, "_collect", lambda x, group: torch.cat([x] * cp_size))
    monkeypatch.setattr(attention_context, "_give_back", lambda x, group: x[: len(x) // cp_size])
    q, grad = (torch.empty(48, 2, 4, width, device="meta", dtype=dtype) for _ in range(2))
    k, v = (torch.empty(48, 2, 2, width, device="meta", dtype=dtype) for _ in range(2))
    kernel = kernel_type()
    block = Block(documents, 2, 48 * cp_size, cp_size, cp_size - 1, kernel.is_varlen, q.device)
    context = Context()
    out = WholeKeysAttention.forward(context, q, k, v, block, kernel, 0.3, None)
    gradients = WholeKeysAttention.backward(context, grad)[:3]
    assert out.shape == q.shape and out.dtype == dtype
    assert [g.shape for g in gradients] == [t.shape for t in (q, k, v)]
    assert all(g.dtype == dtype for g in gradients)
