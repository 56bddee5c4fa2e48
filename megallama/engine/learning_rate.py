"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from megallama.config.schema import OptimConfig, Schedule


def learning_rate(optim: OptimConfig, *, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (0 <= step < total_steps).

    Linear warm-up over `warmup_steps` (step 0 already moves: (step + 1) / warmup_steps), then the schedule down
    to `min_lr_ratio x lr`, which the last step reaches. WSD: Hu et al. 2024, arXiv:2404.06395.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == Schedule.constant:
        return optim.lr
    decay_steps = optim.decay_steps if optim.schedule == Schedule.wsd else total_steps - optim.warmup_steps
    done = step + 1 - (total_steps - decay_steps)
    progress = min(1.0, max(0.0, done / decay_steps))
    if optim.schedule == Schedule.cosine:
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        assert optim.schedule in (Schedule.linear, Schedule.wsd), optim.schedule
        share = 1.0 - progress
    return optim.lr * (optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * share)
