"""The schedules at their corners."""

import math

import pytest

from megallama.config.schema import OptimConfig, Schedule
from megallama.engine.learning_rate import learning_rate


def curve(steps, **settings):
    optim = OptimConfig(lr=1.0, **settings)
    return [learning_rate(optim, step=step, total_steps=steps) for step in range(steps)]


def test_warm_up_rises_to_the_peak_and_the_end_is_the_minimum():
    for schedule in (Schedule.cosine, Schedule.linear):
        values = curve(10, schedule=schedule, warmup_steps=4, min_lr_ratio=0.2)
        assert values[:4] == [0.25, 0.5, 0.75, 1.0]
        assert values[-1] == pytest.approx(0.2)
        assert all(a > b for a, b in zip(values[3:], values[4:], strict=False))


def test_cosine_follows_the_formula():
    values = curve(8, schedule=Schedule.cosine, min_lr_ratio=0.0)
    assert values == pytest.approx([0.5 * (1 + math.cos(math.pi * (s + 1) / 8)) for s in range(8)])


def test_linear_falls_by_equal_amounts():
    values = curve(5, schedule=Schedule.linear, min_lr_ratio=0.0)
    assert values == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


def test_wsd_is_flat_until_its_decay():
    values = curve(10, schedule=Schedule.wsd, warmup_steps=2, decay_steps=4, min_lr_ratio=0.0)
    assert values == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0])


def test_constant_stays():
    assert curve(4, schedule=Schedule.constant, warmup_steps=1) == [1.0] * 4
