"""Whether a kernel of another library can run here: one rule for all that a run may ask for by name."""

from __future__ import annotations

import torch

from megallama.host.built_kernels import refusal, why_not_built
from megallama.host.errors import UserError


def require(setting: str, name: str) -> None:
    """Raise UserError where kernels.`setting`=`name`, which needs CUDA and its library, cannot run here."""
    reason = why_not_built(setting, name) if torch.cuda.is_available() else "there is no CUDA device"
    if reason is not None:
        raise UserError(refusal(setting, name, reason))
