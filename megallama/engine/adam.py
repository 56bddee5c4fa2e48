"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101): the best implementation for this machine, or a given one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch

from megallama.config.schema import OptimConfig
from megallama.host.errors import UserError
from megallama.kernels.named import require

log = logging.getLogger(__name__)

OptimizerFactory = Callable[[list[dict[str, Any]], OptimConfig], torch.optim.Optimizer]
"""(parameter groups, settings) -> optimizer. The engine sets `lr` of every group before each step."""


def parameter_groups(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], *, weight_decay: float
) -> list[dict[str, Any]]:
    """Matrices and embeddings with decay, norms and biases (one dimension) without."""
    decayed: list[torch.nn.Parameter] = []
    spared: list[torch.nn.Parameter] = []
    for _, parameter in parameters:
        (decayed if parameter.dim() > 1 else spared).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_adam(groups: list[dict[str, Any]], optim: OptimConfig, *, kernel: str) -> torch.optim.Optimizer:
    """The optimizer over `groups`. `auto` is torch's fused AdamW, which exists for CPU and CUDA.

    Raises:
        UserError: NVIDIA apex was asked for and is not here.
    """
    settings = dict(lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    if kernel == "apex":
        require("adam", kernel)
        from apex.optimizers import FusedAdam

        optimizer: torch.optim.Optimizer = FusedAdam(groups, adam_w_mode=True, **settings)
        return optimizer
    fused = kernel in ("auto", "fused")
    log.info("kernels: adam=%s", "fused" if fused else "reference")
    return torch.optim.AdamW(groups, fused=fused, foreach=False, **settings)  # type: ignore[arg-type]


def build_own(
    factory: OptimizerFactory, groups: list[dict[str, Any]], optim: OptimConfig
) -> torch.optim.Optimizer:
    """The optimizer that `factory` makes.

    Raises:
        UserError: checkpoints could not hold its state, which would be lost.
    """
    optimizer = factory(groups, optim)
    is_adam = isinstance(optimizer, torch.optim.Adam) and not optimizer.defaults["amsgrad"]
    if not is_adam:
        raise UserError(
            f"optimizer ({type(optimizer).__name__}) may keep a state that checkpoints do not hold yet: return a"
            " torch.optim.AdamW, or a class derived from it with the same state (exp_avg, exp_avg_sq, step)"
        )
    log.info("optimizer: %s", type(optimizer).__name__)
    return optimizer
