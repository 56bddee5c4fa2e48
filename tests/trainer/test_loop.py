"""The loop with a fake engine: steps, hooks, stops and failures."""

import math

import pytest

from megallama.engine.step import EvalResult, StepResult
from megallama.host.errors import UserError
from megallama.trainer.hooks import CheckpointHook, EvalHook, GuardHook, Hook, StopHook
from megallama.trainer.loop import Trainer
from megallama.trainer.state import TrainState


class FakeEngine:
    def __init__(self, losses=None):
        self.steps = []
        self.losses = losses or {}

    def train_step(self, step, batches):
        self.steps.append((step, batches))
        loss, skipped = self.losses.get(step, (1.0, False))
        return StepResult(loss=loss, grad_norm=loss, lr=0.1, num_tokens=8, loss_scale=1.0, is_skipped=skipped)

    def eval_step(self, batches):
        return EvalResult(loss_sum=sum(batches), num_tokens=len(batches))


class FakeLoader:
    def batches(self, step):
        return [f"batch {step}"]


class Recorder(Hook):
    def __init__(self):
        self.events = []

    def start(self, state):
        self.events.append(("start", state.step))

    def after_step(self, state, report):
        self.events.append(("step", state.step, dict(report.numbers)))

    def finish(self, state):
        self.events.append(("finish", state.step))


def trainer(engine, hooks, *, steps=3, state=None):
    return Trainer(
        engine,
        FakeLoader(),
        state=state or TrainState(),
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
    saved = []
    trainer(
        FakeEngine(), [CheckpointHook(lambda s: saved.append(s.step), interval=2, last_step=4)], steps=4
    ).fit()
    assert saved == [2, 4]
    saved.clear()
    trainer(FakeEngine(), [CheckpointHook(lambda s: saved.append(s.step), interval=0, last_step=3)]).fit()
    assert saved == [3]


def test_evaluation_is_the_mean_over_tokens():
    recorder = Recorder()
    hook = EvalHook(FakeEngine(), lambda: [[2.0, 2.0], [5.0]], interval=2, last_step=3)
    trainer(FakeEngine(), [hook, recorder]).fit()
    numbers = [event[2] for event in recorder.events if event[0] == "step"]
    assert numbers == [{}, *([{"eval/loss": 3.0, "eval/perplexity": pytest.approx(math.exp(3.0))}] * 2)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_step_ends_the_run_before_it_is_saved(bad):
    saved, recorder = [], Recorder()
    hooks = [recorder, GuardHook(), CheckpointHook(lambda s: saved.append(s.step), interval=1, last_step=3)]
    with pytest.raises(UserError, match="step 2 diverged"):
        trainer(FakeEngine({1: (bad, False)}), hooks).fit()
    assert saved == [1]
    assert recorder.events[-1] == ("finish", 2)


def test_a_step_skipped_by_fp16_is_no_divergence():
    assert trainer(FakeEngine({1: (math.inf, True)}), [GuardHook()]).fit() is True


def test_a_stop_request_saves_and_ends():
    saved, requests = [], iter([False, True])
    job = trainer(FakeEngine(), [StopHook(lambda: next(requests), lambda s: saved.append(s.step))])
    assert job.fit() is False
    assert saved == [2] and job.state.step == 2


def test_state_survives_json_and_refuses_strangers():
    state = TrainState(step=3, consumed_samples=12, consumed_tokens=96)
    assert TrainState.from_json(state.to_json()) == state
    with pytest.raises(UserError, match="not of this version"):
        TrainState.from_json({"step": 1})
