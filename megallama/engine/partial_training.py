"""Training of a part of the weights during the first steps: rows of new tokens, or chosen parameters.

Gradients of all else become zero where autograd hands them over, before ZeRO sums, clips or shards anything: so every
layout and stage sees the same gradient, and the norm that clips is that of the trained part. Adam leaves a weight with
zero gradient and zero moments as it is, to the bit; weight decay would not, so it rests meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch

from megallama.config.schema import OptimConfig
from megallama.engine.state import own_fragments
from megallama.engine.zero import ZeroEngine
from megallama.model.build import EMBEDDING, OUTPUT, Stage
from megallama.model.layout import Piece

Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""Elements [begin, end) of a flattened local parameter."""


class PartialTraining:
    """Keeps all but the chosen weights as they are while `begin` says so."""

    def __init__(self, optim: OptimConfig, stage: Stage, zero: ZeroEngine) -> None:
        self._optim = optim
        self._stage = stage
        self._zero = zero
        self._is_active = False
        self._is_clean = False
        self._kept: dict[str, Ranges] = {}
        if not optim.partial_steps:
            return
        for name, parameter in stage.module.named_parameters():
            pieces = stage.layout[name]
            self._kept[name] = tuple(part for piece in pieces for part in _kept_of(piece, optim))
            parameter.register_hook(self._hook(name))

    def begin(self, step: int) -> bool:
        """Whether step number `step` (from 0) trains a part only; to be called before its first backward."""
        self._is_active = step < self._optim.partial_steps
        if self._is_active and not self._is_clean:
            # Moments of an earlier life, when a resumed run is asked for more partial steps than it began with.
            for fragment in own_fragments(self._zero, self._stage.module):
                for kind, view in fragment.views.items():
                    if kind != "fp32":
                        _zero_ranges(view, self._kept[fragment.param_name], begin=fragment.start)
            self._is_clean = True
        return self._is_active

    def _hook(self, name: str) -> Callable[[torch.Tensor], torch.Tensor | None]:
        kept = self._kept[name]

        def mask(gradient: torch.Tensor) -> torch.Tensor | None:
            if not self._is_active or not kept:
                return None
            if sum(end - begin for begin, end in kept) == gradient.numel():
                return torch.zeros_like(gradient)
            masked = gradient.clone(memory_format=torch.contiguous_format)
            _zero_ranges(masked.view(-1), kept, begin=0)
            return masked

        return mask


def _kept_of(piece: Piece, optim: OptimConfig) -> Ranges:
    """What of `piece` stays as it is, in elements of the local parameter."""
    size = math.prod(piece.shape)
    if any(fnmatchcase(piece.key, pattern) for pattern in optim.partial_parameters):
        return ()
    if optim.partial_rows_from is not None and piece.key in (EMBEDDING, OUTPUT):
        old_rows = min(piece.shape[0], max(0, optim.partial_rows_from - piece.offset[0]))
        size = old_rows * math.prod(piece.shape[1:])
    return ((piece.start, piece.start + size),) if size else ()


def _zero_ranges(flat: torch.Tensor, ranges: Ranges, *, begin: int) -> None:
    """Zero `ranges` of a parameter in `flat`, which holds its elements from `begin` on."""
    for low, high in ranges:
        low, high = max(0, low - begin), min(flat.numel(), high - begin)
        if low < high:
            flat[low:high].zero_()
