"""A request to stop may come twice at once; a later second one ends the run without waiting."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from megallama.trainer import build
from megallama.trainer.build import SignalHook
from megallama.trainer.state import TrainState


class Clock:
    """Goes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(build, "time", clock)
    return clock


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """(signal, whether rank 0) of each end at once."""
    found: list[tuple[int, bool]] = []
    monkeypatch.setattr(build, "_end_at_once", lambda number, is_first: found.append((int(number), is_first)))
    return found


@pytest.fixture
def hook(clock: Clock) -> Iterator[SignalHook]:
    topology: Any = SimpleNamespace(rank=0)
    saver: Any = None
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    hook = SignalHook(topology, saver)
    run: Any = None
    hook.start(TrainState(), run)
    yield hook
    hook.finish(TrainState())
    signal.signal(signal.SIGTERM, previous)


def test_two_at_once_are_one_request(hook: SignalHook, clock: Clock, ended: list[tuple[int, bool]]) -> None:
    signal.raise_signal(signal.SIGTERM)
    clock.now += build.SAME_REQUEST_S
    signal.raise_signal(signal.SIGINT)
    assert hook._received_s == 100.0 and ended == []


def test_a_later_one_ends_the_run(hook: SignalHook, clock: Clock, ended: list[tuple[int, bool]]) -> None:
    signal.raise_signal(signal.SIGTERM)
    clock.now += build.SAME_REQUEST_S + 0.01
    signal.raise_signal(signal.SIGINT)
    assert ended == [(signal.SIGINT, True)]


@pytest.fixture
def before() -> Any:
    return signal.getsignal(signal.SIGINT)  # ignored where the tests run in the background


def test_the_run_leaves_signals_as_they_were(before: Any, hook: SignalHook) -> None:
    hook.finish(TrainState())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is before
