"""Kernels of libraries that a run may ask for by name: the one rule of whether such a library is built here.

It imports nothing, so that the check before a start can apply it as well as the ranks.
"""

from __future__ import annotations

import importlib.util

_NO_APEX = "NVIDIA apex with its CUDA extensions is not built here (see docker/)"
_NO_ENGINE = "Transformer Engine is not installed (pip install transformer-engine[pytorch])"

# Apex is known by its compiled extensions: the package called `apex` on the index is another project, and NVIDIA's can
# be installed without them.
_MODULES = {
    ("norm", "apex"): ("fused_layer_norm_cuda", _NO_APEX),
    ("adam", "apex"): ("amp_C", _NO_APEX),
    ("attention", "te"): ("transformer_engine", _NO_ENGINE),
}


def why_not_built(setting: str, name: str) -> str | None:
    """Why kernels.`setting`=`name` cannot run on any machine that has these packages, or None."""
    if (setting, name) not in _MODULES:
        return None
    module, reason = _MODULES[setting, name]
    return reason if importlib.util.find_spec(module) is None else None


def refusal(setting: str, name: str, reason: str) -> str:
    """The message for a kernel that was asked for and cannot run."""
    return f"kernels.{setting} ({name}) cannot run: {reason}; use kernels.{setting}=auto"
