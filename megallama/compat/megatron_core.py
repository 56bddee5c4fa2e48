"""Stand-ins with which megatron-core runs on a host without CUDA. Nothing else in the project knows of them.

Read in megatron-core 0.16.1. It names CUDA in a few modules: factories with `device="cuda"`, the current device,
synchronisation, random state. Each module below gets, in place of its global `torch`, a view of torch in
which just these names mean the CPU; torch itself stays untouched. This can go when megatron-core takes
its device from the tensors; `tests/compat/test_megatron_core.py` fails when a module here no longer needs it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from megallama.compat.views import ModuleView

VERSION = "0.16.1"

MODULES = {
    "megatron.core.pipeline_parallel.schedules": 'token counter on device="cuda"',
    "megatron.core.pipeline_parallel.p2p_communication": "receive buffers on the current device, synchronize",
    "megatron.core.tensor_parallel.random": "random streams are CUDA generators",
    "megatron.core.tensor_parallel.mappings": "output buffers on the current device",
    "megatron.core.tensor_parallel.layers": "parameters and gathered inputs on the current device",
    "megatron.core.tensor_parallel.utils": "gather buffers on the current device",
    "megatron.core.utils": "the shared gather buffer of sequence parallel",
    "megatron.core.models.common.embeddings.rotary_pos_embedding": "frequencies move to the current device",
}
"""Modules that get the view, with what they need it for."""

_CPU = torch.device("cpu")


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def create(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return create


def _restore_rng_state(state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
    torch.set_rng_state(state)


def _current_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def install_cpu_stand_ins() -> None:
    """Give the modules above their view of torch. Does nothing where CUDA is present; may be called again."""
    if torch.cuda.is_available():
        return
    cuda = ModuleView(
        torch.cuda,
        current_device=lambda: _CPU,
        synchronize=lambda *args, **kwargs: None,
        get_rng_state=_current_rng_state,
        set_rng_state=_restore_rng_state,
        manual_seed=torch.manual_seed,
        initial_seed=torch.initial_seed,
    )
    view = ModuleView(torch, cuda=cuda, zeros=_on_cpu(torch.zeros), tensor=_on_cpu(torch.tensor))
    for name in MODULES:
        module: Any = importlib.import_module(name)
        module.torch = view
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    # With one generator for both, "the CPU state" next to "the CUDA state" is saved and compared for nothing.
    no_state = torch.zeros(0)
    random.torch = ModuleView(view, get_rng_state=lambda: no_state, set_rng_state=lambda state: None)
    random._get_cuda_rng_state = _current_rng_state
    random._set_cuda_rng_state = _restore_rng_state
