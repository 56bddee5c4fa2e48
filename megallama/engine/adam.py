"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101): selects the best implementation for this machine."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable

import torch

from megallama.config.schema import OptimConfig
from megallama.host.errors import UserError

log = logging.getLogger(__name__)


def parameter_groups(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], *, weight_decay: float
) -> list[dict[str, object]]:
    """Matrices and embeddings with decay, norms and biases (one dimension) without."""
    decayed: list[torch.nn.Parameter] = []
    spared: list[torch.nn.Parameter] = []
    for _, parameter in parameters:
        (decayed if parameter.dim() > 1 else spared).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_adam(groups: list[dict[str, object]], optim: OptimConfig, *, kernel: str) -> torch.optim.Optimizer:
    """The optimizer over `groups`. `auto` is torch's fused AdamW, which exists for CPU and CUDA.

    Raises:
        UserError: NVIDIA apex was asked for and is not here.
    """
    settings = dict(lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    if kernel == "apex":
        if not torch.cuda.is_available() or importlib.util.find_spec("amp_C") is None:
            raise UserError(
                "kernels.adam (apex) cannot run: it needs CUDA and NVIDIA apex (see docker/); use kernels.adam=auto"
            )
        from apex.optimizers import FusedAdam

        optimizer: torch.optim.Optimizer = FusedAdam(groups, adam_w_mode=True, **settings)
        return optimizer
    fused = kernel in ("auto", "fused")
    log.info("kernels: adam=%s", "fused" if fused else "reference")
    return torch.optim.AdamW(groups, fused=fused, foreach=False, **settings)  # type: ignore[arg-type]
