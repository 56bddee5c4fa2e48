"""The loop with a fake engine: steps, hooks, stops and failures."""

import math
from pathlib import Path

import pytest

from megallama.engine.step import EvalResult, StepResult
from megallama.host.errors import UserError
from megallama.trainer.hooks.base import CheckpointHook, EvalHook, GuardHook, Hook, RunView, StopHook
from megallama.trainer.loop import Loop
from megallama.trainer.state import TrainState


class FakeEngine:
    def __init__(self, losses=None):
        self.steps = []
        self.losses = losses or {}

    def train_step(self, step, batches):
        self.steps.append((step, batches))
        loss, norm, scale = self.losses.get(step, (1.0, 1.0, None))
        is_skipped = scale is not None
        return StepResult(loss, norm, lr=0.1, num_tokens=8, loss_scale=scale or 1.0, is_skipped=is_skipped)

    def eval_step(self, batches):
        return EvalResult(loss_sum=sum(batches), num_tokens=len(batches))


class FakeLoader:
    def batches(self, step):
        return [f"batch {step}"]


class Recorder(Hook):
    def __init__(self):
        self.events = []

    def start(self, state, run):
        self.events.append(("start", state.step))

    def after_step(self, state, report):
        self.events.append(("step", state.step, dict(report.numbers)))

    def finish(self, state):
        self.events.append(("finish", state.step))


class FakeSaver:
    def __init__(self):
        self.events = []

    def reserve(self):
        self.events.append("reserve")

    def save(self, state):
        self.events.append(state.step)

    def save_now(self, state):
        self.events.append(("now", state.step))

    def finish(self):
        self.events.append("finish")


def save_nothing(state):
    """What a hook of the user's may call."""


def trainer(engine, hooks, *, steps=3, state=None):
    return Loop(
        engine,
        FakeLoader(),
        state=state or TrainState(),
        run=RunView(rank=0, world_size=1, folder=Path("run"), parameters=lambda: iter(()), save=save_nothing),
        hooks=hooks,
        steps=steps,
        samples_per_step=4,
        tokens_per_step=32,
    )


def test_runs_every_step_once_and_counts():
    engine, recorder = FakeEngine(), Recorder()
    job = trainer(engine, [recorder])
    assert job.fit() is True
    assert engine.steps == [(0, ["batch 0"]), (1, ["batch 1"]), (2, ["batch 2"])]
    assert recorder.events == [("start", 0), ("step", 1, {}), ("step", 2, {}), ("step", 3, {}), ("finish", 3)]
    assert job.state == TrainState(step=3, consumed_samples=12, consumed_tokens=96)


def test_a_resumed_run_takes_only_what_is_left():
    engine = FakeEngine()
    trainer(engine, [], state=TrainState(step=2, consumed_samples=8, consumed_tokens=64)).fit()
    assert [step for step, _ in engine.steps] == [2]


def test_checkpoints_at_the_interval_and_at_the_end_once():
    for interval, steps, wanted in ((2, 4, [2, ("now", 4)]), (2, 3, [2, ("now", 3)]), (0, 3, [("now", 3)])):
        saver = FakeSaver()
        hook = CheckpointHook(saver, interval=interval, last_step=steps)
        trainer(FakeEngine(), [hook], steps=steps).fit()
        assert saver.events == ["reserve", *wanted, "finish"]


def test_evaluation_is_the_mean_over_tokens():
    recorder = Recorder()
    hook = EvalHook(FakeEngine(), lambda: [[2.0, 2.0], [5.0]], interval=2, last_step=3)
    trainer(FakeEngine(), [hook, recorder]).fit()
    numbers = [event[2] for event in recorder.events if event[0] == "step"]
    assert numbers == [{}, *([{"eval/loss": 3.0, "eval/perplexity": pytest.approx(math.exp(3.0))}] * 2)]


DIVERGED = {
    "loss": (math.nan, 1.0, None),
    "gradient": (1.0, math.inf, None),
    "loss of a step that fp16 skipped": (math.nan, math.inf, 1024.0),
    "smallest loss scale": (1.0, math.inf, 1.0),
}


@pytest.mark.parametrize("bad", DIVERGED.values(), ids=DIVERGED)
def test_a_diverged_step_ends_the_run_before_it_is_saved(bad):
    saver, recorder = FakeSaver(), Recorder()
    hooks = [recorder, GuardHook(), CheckpointHook(saver, interval=1, last_step=3)]
    with pytest.raises(UserError, match="step 2 diverged"):
        trainer(FakeEngine({1: bad}), hooks).fit()
    assert saver.events == ["reserve", 1, "finish"], "a save under way is completed"
    assert recorder.events[-1] == ("finish", 2)


def test_a_validation_loss_that_is_no_number_is_divergence():
    evaluation = EvalHook(FakeEngine(), lambda: [[math.nan]], interval=2, last_step=3)
    with pytest.raises(UserError, match=r"step 2 diverged \(loss 1, validation loss nan\)"):
        trainer(FakeEngine(), [evaluation, GuardHook()]).fit()


def test_a_step_skipped_by_fp16_is_no_divergence():
    assert trainer(FakeEngine({1: (1.0, math.inf, 2.0)}), [GuardHook()]).fit() is True


def test_a_stop_request_saves_and_ends():
    saver, requests = FakeSaver(), iter([False, True])
    job = trainer(FakeEngine(), [StopHook(lambda: next(requests), saver)])
    assert job.fit() is False
    assert saver.events == [("now", 2)] and job.state.step == 2


def test_state_survives_json_and_refuses_strangers():
    state = TrainState(step=3, consumed_samples=12, consumed_tokens=96)
    assert TrainState.from_json(state.to_json()) == state
    with pytest.raises(UserError, match="not valid in this version"):
        TrainState.from_json({"step": 1})
