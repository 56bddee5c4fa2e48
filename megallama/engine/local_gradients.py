"""ZeRO 2 with gradients reduced once for several micro-batches: each rank sums them locally in fp32 until then.

DeepSpeed 0.19.8 reduces at every backward under ZeRO 2, as it keeps no gradient of another rank. Its own way to put
that off (`coalesce_grad_reduction`) wants to own the micro-batches, refuses pipelines, and sums in the parameters'
format. What is done here: its hook on a parameter (`process_gradients`) is called only for a parameter's last
micro-batch of each k, with the sum. Micro-batches are counted for each parameter by itself, because under the
interleaved schedule the chunks of a rank take turns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megallama.compat.deepspeed import GradientHooks


class LocalGradients:
    """Stands between DeepSpeed's hooks and its reduction.

    Args:
        optimizer: DeepSpeed's ZeRO 2 optimizer.
        period: Micro-batches that are summed before a reduction.
        backwards: Gradients that a parameter gets in a step.
        further: By parameter, how many more than that it gets.
    """

    def __init__(
        self, optimizer: Any, *, period: int, backwards: int, further: Mapping[torch.nn.Parameter, int]
    ) -> None:
        self._optimizer = optimizer
        self._period = period
        self._backwards = backwards
        self._further = further
        self._seen: Counter[torch.nn.Parameter] = Counter()
        self._sums: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._handed: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._hooks = GradientHooks(optimizer, take=self._take, to_reduce=self._to_reduce)

    def kept(self) -> Iterator[torch.Tensor]:
        """Sums that were not reduced yet."""
        yield from self._sums.values()

    def end_backward(self) -> None:
        """Let go of what DeepSpeed has reduced."""
        self._handed.clear()

    def end_step(self) -> None:
        """Start to count anew; every gradient must have been reduced."""
        assert not self._sums, f"{len(self._sums)} gradients were summed and never reduced"
        self._seen.clear()

    def _take(self, parameter: torch.nn.Parameter, group: int) -> None:
        assert parameter.grad is not None
        # Also where nothing is reduced: the end of a backward looks into the buckets.
        self._optimizer.setup_buckets()
        self._seen[parameter] += 1
        wide = self._optimizer.gradient_accumulation_dtype
        total = self._sums.pop(parameter, None)
        total = parameter.grad.to(wide) if total is None else total.add_(parameter.grad)
        parameter.grad = None
        seen = self._seen[parameter]
        if seen % self._period and seen < self._backwards + self._further.get(parameter, 0):
            self._sums[parameter] = total
            return
        if parameter.dtype == wide:
            parameter.grad = total
        else:
            self._handed[parameter] = total
        self._hooks.reduce(parameter, group)

    def _to_reduce(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """What DeepSpeed reduces: a wide sum cannot stand in the `grad` of a narrow parameter."""
        handed = self._handed.get(parameter)
        return handed if handed is not None else self._hooks.gradient_of(parameter)
