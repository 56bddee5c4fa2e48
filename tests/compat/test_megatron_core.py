"""The stand-ins: complete, confined to megatron-core, and each still needed."""

import ast
import importlib
import inspect
from importlib.metadata import version

import pytest
import torch

from megallama.compat.megatron_core import (
    MODULES,
    VERSION,
    _current_rng_state,
    _restore_rng_state,
    install_cpu_stand_ins,
)


@pytest.fixture(autouse=True)
def installed():
    install_cpu_stand_ins()


def test_the_version_is_the_one_that_was_read():
    assert version("megatron-core") == VERSION, "read compat/megatron_core.py against the new version"


def test_random_streams_still_go_through_private_functions():
    """The tracker of a GPU's streams takes and sets their state by these two; both mean the CPU's here."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    source = inspect.getsource(random.CudaRNGStatesTracker)
    assert "_get_cuda_rng_state(" in source and "_set_cuda_rng_state(" in source
    assert (
        random._get_cuda_rng_state is _current_rng_state and random._set_cuda_rng_state is _restore_rng_state
    )
    checkpoint = inspect.getsource(random.CheckpointFunction) + inspect.getsource(random._set_all_rng_states)
    assert "torch.set_rng_state" in checkpoint, "the CPU's state is not set beside the GPU's: drop `no_state`"


def test_torch_itself_is_untouched():
    assert not torch.cuda.is_available()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_device()


@pytest.mark.parametrize("name", MODULES)
def test_module_sees_the_cpu_and_still_needs_to(name):
    module = importlib.import_module(name)
    assert module.torch.cuda.current_device() == torch.device("cpu")
    assert module.torch.zeros([], device="cuda").device.type == "cpu"
    assert module.torch.Tensor is torch.Tensor
    source = ast.unparse(ast.parse(inspect.getsource(module)))
    assert "torch.cuda." in source or "'cuda'" in source, f"{name} names CUDA no more: drop its stand-in"


def test_random_streams_fork_and_return():
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, initialize_rng_tracker

    initialize_rng_tracker(force_reset=True)
    tracker = get_cuda_rng_tracker()
    tracker.add("model-parallel-rng", 7)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with tracker.fork():
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected), "the fork moved the default stream"
    with tracker.fork():
        assert not torch.equal(torch.rand(3), first), "the stream starts over at each fork"
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), first)
