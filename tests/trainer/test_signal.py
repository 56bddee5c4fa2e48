"""A request to stop may come twice at once; a later second one ends the run without waiting."""

import signal

import pytest

from megallama.trainer import build
from megallama.trainer.build import SignalHook
from megallama.trainer.state import TrainState


@pytest.fixture
def hook(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(build.time, "monotonic", lambda: clock[0])
    ended = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    hook = SignalHook.__new__(SignalHook)
    hook._received_s, hook._previous, hook.ended, hook.clock = None, {}, ended, clock
    hook.start(TrainState())
    yield hook
    hook.finish(TrainState())
    signal.signal(signal.SIGTERM, previous)


def test_two_at_once_are_one_request(hook):
    signal.raise_signal(signal.SIGTERM)
    hook.clock[0] += build.SAME_REQUEST_S - 0.1
    signal.raise_signal(signal.SIGTERM)
    assert hook._received_s is not None and hook.ended == []


def test_a_later_one_ends_the_run(hook):
    signal.raise_signal(signal.SIGTERM)
    hook.clock[0] += build.SAME_REQUEST_S + 0.1
    signal.raise_signal(signal.SIGTERM)
    assert hook.ended == [signal.SIGTERM]
