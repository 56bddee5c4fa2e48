"""What each sink leaves behind, over a resume and over failures."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import resource
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megallama.config.schema import LogConfig, WandbMode
from megallama.metrics.jsonl import JsonlSink, load_metrics
from megallama.metrics.recorder import Recorder, build_recorder
from megallama.metrics.tensorboard import TensorBoardSink
from tests.metrics.test_meter import CONFIG, RESULT, at, meter

FACTS: dict[str, str | int | float] = {
    "model": "小模型 [7b]",
    "parameters": 1000,
    "world_size": 4,
    "device": "cpu",
    "dtype": "fp32",
    "mfu_attention": "causal",
    "peak_tflops": 2.0,
    "peak_source": "test",
    "memory_kind": "peak resident",
}


DAMAGE = (
    b"garbage\n",
    b"\xff\xfe\x00 \xe4\xb8\n",
    b'{"progress/step": 3, "train/l\n',
    b"[1, 2]\n",
    b"\n",
    b'{"train/loss": 1.0}\n',
    b'{"progress/step": "3"}\n',
    b'{"progress/step": 3, "train/loss": "x"}\n',
    b'{"progress/step": 3, "nonfinite": 4}\n',
    b'{"progress/step": 3, "nonfinite": {"train/loss": "many"}}\n',
    b"[" * 100_000 + b"\n",
)
"""What may stand where a line of metrics.jsonl stood."""


def numbers_of(step: int, *, grad_norm: float = 0.7, is_skipped: bool = False) -> dict[str, float]:
    """Metrics of a step whose loss is its number."""
    result = dataclasses.replace(RESULT, loss=float(step), grad_norm=grad_norm, is_skipped=is_skipped)
    return meter().measure(result, progress=at(step), seconds=1.0)


def record(sink: JsonlSink | TensorBoardSink, steps: range) -> None:
    for step in steps:
        sink.write(step, numbers_of(step))
    sink.close()


class TestJsonl:
    def test_line_is_there_at_once(self, tmp_path: Path) -> None:
        sink = JsonlSink(tmp_path / "metrics.jsonl", first_step=0)
        sink.write(1, numbers_of(1))
        assert load_metrics(tmp_path / "metrics.jsonl") == [numbers_of(1)]
        sink.close()

    def test_resume_keeps_each_step_once(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        record(JsonlSink(path, first_step=0), range(1, 8))
        with path.open("a", encoding="utf-8") as file:
            file.write('{"progress/step": 8, "train/l')  # killed in the middle of a line
        record(JsonlSink(path, first_step=5), range(6, 10))
        assert [row["progress/step"] for row in load_metrics(path)] == list(range(1, 10))
        assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]

    def test_start_from_nothing_drops_an_older_record(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        record(JsonlSink(path, first_step=0), range(1, 4))
        record(JsonlSink(path, first_step=0), range(1, 3))
        assert [row["progress/step"] for row in load_metrics(path)] == [1, 2]

    @pytest.mark.parametrize("damage", DAMAGE, ids=[repr(line[:24]) for line in DAMAGE])
    def test_a_damaged_line_is_put_aside_and_costs_no_other(
        self, damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "metrics.jsonl"
        record(JsonlSink(path, first_step=0), range(1, 6))
        lines = path.read_bytes().splitlines(keepends=True)
        lines[2] = damage
        path.write_bytes(b"".join(lines))
        assert [row["progress/step"] for row in load_metrics(path)] == [1, 2, 4, 5]
        assert caplog.messages == [f"{path}: line 3 cannot be read and left out"]
        caplog.clear()
        for _ in range(2):
            record(JsonlSink(path, first_step=4), range(5, 7))
        assert caplog.messages == [f"{path}: line 3 cannot be read and moved to metrics.jsonl.damaged"]
        assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damage
        assert path.read_bytes().splitlines(keepends=True)[:3] == [*lines[:2], lines[3]], "bytes as they were"
        assert [row["progress/step"] for row in load_metrics(path)] == [1, 2, 4, 5, 6]

    def test_loss_comes_back_bit_for_bit(self, tmp_path: Path) -> None:
        path, loss = tmp_path / "metrics.jsonl", 0.1 + 0.2
        sink = JsonlSink(path, first_step=0)
        sink.write(1, {"train/loss": loss})
        sink.close()
        assert load_metrics(path)[0]["train/loss"] == loss

    def test_infinity_and_nan_are_valid_json(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        sink = JsonlSink(path, first_step=0)
        sink.write(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/lr": 1e-3})
        sink.close()

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        row = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
        assert row["train/grad_norm"] is None
        assert row["nonfinite"] == {"train/loss": "nan", "train/grad_norm": "inf"}
        loaded = load_metrics(path)[0]
        assert math.isnan(loaded["train/loss"]) and loaded["train/grad_norm"] == math.inf
        assert loaded["train/lr"] == 1e-3 and "nonfinite" not in loaded


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path: Path) -> None:
    record(TensorBoardSink(tmp_path, first_step=0), range(1, 8))
    record(TensorBoardSink(tmp_path, first_step=5), range(6, 10))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    loss = events.Scalars("train/loss")
    assert [event.step for event in loss] == list(range(1, 10))
    assert [event.value for event in loss] == [float(step) for step in range(1, 10)]
    assert "progress/step" not in events.Tags()["scalars"]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_on_a_full_disk_raises_and_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    excepthook = threading.excepthook
    sink = TensorBoardSink(tmp_path, first_step=0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))  # no file may grow beyond, as on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            for step in range(1, 10_000):
                sink.write(step, numbers_of(step))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(OSError, match="File too large"):
        sink.close()
    assert threading.excepthook is excepthook, "other threads are heard again"
    assert capfd.readouterr() == ("", "")


class TestRecorder:
    def test_tensorboard_can_be_left_out(self, tmp_path: Path) -> None:
        for wanted in (False, True):
            recorder = build_recorder(
                LogConfig(wandb=WandbMode.disabled, tensorboard=wanted),
                steps=CONFIG.train.steps,
                run_values=dataclasses.asdict(CONFIG),
                run_dir=tmp_path,
                first_step=0,
                is_terminal=False,
                facts=FACTS,
            )
            recorder.record(1, numbers_of(1))
            recorder.close()
            assert (tmp_path / "tensorboard").exists() == wanted
        assert len(load_metrics(tmp_path / "metrics.jsonl")) == 1

    def test_closing_reaches_every_sink(self, caplog: pytest.LogCaptureFixture) -> None:
        closed: list[str] = []

        class Good:
            def write(self, step: int, numbers: Mapping[str, float]) -> None: ...

            def close(self) -> None:
                closed.append("good")

        class Bad(Good):
            def close(self) -> None:
                raise OSError("disk full")

        with caplog.at_level(logging.ERROR), pytest.raises(OSError, match="disk full"):
            Recorder([Bad(), Good()]).close()
        assert closed == ["good"]

    def test_trackers_are_imported_only_when_used(self) -> None:
        program = (
            "import sys, megallama.metrics.recorder;"
            "sys.exit(','.join({'wandb', 'tensorboard', 'matplotlib'} & set(sys.modules)) or 0)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
