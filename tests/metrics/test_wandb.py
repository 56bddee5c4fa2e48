"""Weights & Biases: its own settings count, one run for one run folder, and no failure of it reaches training."""

from __future__ import annotations

import json
import logging
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from megallama.config.schema import LogConfig, WandbMode
from megallama.metrics.recorder import build_recorder
from megallama.metrics.wandb import CORE_LOG, RUN_ID_FILE, WandbSink
from tests.metrics.test_recorder import FACTS
from tests.metrics.wandb_server import serving

KEY = "0" * 40


@pytest.fixture(autouse=True)
def own_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No settings of whoever runs the tests, and no service that outlives them."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / ".netrc"))
    yield
    wandb.teardown()


def open_sink(
    run_dir: Path, *, mode: str = "auto", project: str | None = None, first_step: int = 0
) -> WandbSink:
    """The sink of a run whose folder is made first."""
    run_dir.mkdir(parents=True, exist_ok=True)
    return WandbSink(run_dir, project=project, mode=mode, settings={"model": "小模型"}, first_step=first_step)


def records(folder: Path) -> list[Record]:
    """What is in the .wandb file below `folder`: LevelDB's log format, after a header of seven bytes."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    content, found, whole, place = file.read_bytes(), [], b"", 7
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(whole))
            whole = b""
    return found


def test_its_own_settings_go_before_our_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is typed goes before both. System statistics are on, the steps of the run are the axis."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name, value in {"MODE": "offline", "PROJECT": "theirs", "NAME": "名", "DIR": str(elsewhere)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    sink = open_sink(tmp_path / "run")
    run = sink._run
    assert not run.settings.x_disable_stats
    for step in (1, 2):
        sink.write(step, {"train/loss": 1.0 / step, "progress/step": step})
    sink.close()
    wrote = records(elsewhere)
    (header,) = [record.run for record in wrote if record.WhichOneof("record_type") == "run"]
    assert (header.project, header.display_name) == ("theirs", "名")
    assert not (tmp_path / "run" / "wandb").exists()
    axes = {record.metric.name or record.metric.glob_name: record.metric.step_metric for record in wrote}
    assert axes["*"] == "progress/step"
    steps = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in wrote
        if record.WhichOneof("record_type") == "history"
    ]
    assert [(row["progress/step"], row["train/loss"]) for row in steps] == [(1, 1.0), (2, 0.5)]
    typed = open_sink(tmp_path / "run2", project="ours", mode="offline")
    assert typed._run.project == "ours"
    typed.close()


@pytest.mark.parametrize(
    ("variables", "typed", "has_netrc", "expected"),
    [
        ({}, "auto", False, "offline"),
        ({}, "auto", True, "online"),
        ({"WANDB_API_KEY": KEY}, "auto", False, "online"),
        ({"WANDB_MODE": "disabled", "WANDB_API_KEY": KEY}, "auto", True, None),
        ({"WANDB_MODE": "offline"}, "online", True, "online"),
        ({"WANDB_MODE": "disabled"}, "offline", True, "offline"),
        ({}, "online", False, "offline"),
        ({"WANDB_MODE": "online"}, "disabled", True, None),
    ],
)
def test_mode(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    typed: str,
    has_netrc: bool,
    expected: str | None,
) -> None:
    """The key of `wandb login` is seen; WANDB_MODE counts unless a mode is typed; nothing prompts."""
    if has_netrc:
        netrc = tmp_path / "home" / ".netrc"
        netrc.write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n", encoding="utf-8")
        netrc.chmod(0o600)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    begun: list[str] = []

    def begin(*_: object, mode: str, **__: object) -> Any:
        begun.append(mode)
        raise OSError("not in a test")

    monkeypatch.setattr("megallama.metrics.wandb._begin", begin)
    # Its service is a process of its own, and says nothing of modes and keys.
    monkeypatch.setattr("wandb.sdk.wandb_setup._WandbSetup.ensure_service", lambda self: None)
    settings = LogConfig(wandb=WandbMode(typed), tensorboard=False)
    build_recorder(
        settings, steps=1, run_values={}, run_dir=tmp_path, first_step=0, is_terminal=False, facts=FACTS
    )
    assert begun[:1] == ([expected] if expected else [])


@pytest.mark.parametrize("can_rewind", [True, False])
def test_a_resume_rewinds_the_run_or_goes_on_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_rewind: bool
) -> None:
    """W&B drops what is logged at a step below its own, so a server that cannot rewind gets no step."""
    calls: list[dict[str, Any]] = []
    logged: list[tuple[int, int | None]] = []

    class Run:
        starting_step = 3 if can_rewind else 8

        def define_metric(self, *_: object, **__: object) -> None: ...

        def log(self, numbers: dict[str, float], step: int | None) -> None:
            logged.append((int(numbers["progress/step"]), step))

        def finish(self) -> None: ...

    def init(*, config: object, settings: wandb.Settings) -> Run:
        moment = settings.resume_from
        calls.append({"id": settings.run_id, "resume": settings.resume, "from": moment and moment.value})
        if moment is not None and not can_rewind:
            raise wandb.Error("rewind is not supported")
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr("wandb.sdk.wandb_setup._WandbSetup.ensure_service", lambda self: None)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    (tmp_path / RUN_ID_FILE).write_text("abc", encoding="utf-8")
    sink = open_sink(tmp_path, first_step=2)
    sink.write(3, {"train/loss": 1.0})
    sink.close()
    rewound, beside = {"id": "abc", "resume": None, "from": 2}, {"id": "abc", "resume": "allow", "from": None}
    assert calls == ([rewound] if can_rewind else [rewound, beside])
    assert logged == [(3, 3 if can_rewind else None)]


@pytest.mark.long
@pytest.mark.parametrize("can_rewind", [True, False])
def test_what_a_server_gets_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_rewind: bool
) -> None:
    """The server has steps up to 8 and the checkpoint is of step 4: no step that is done again is lost."""
    with serving(last_step=8, can_rewind=can_rewind) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        (tmp_path / RUN_ID_FILE).write_text("abc", encoding="utf-8")
        sink = open_sink(tmp_path, first_step=4)
        for step in (5, 6, 7):
            sink.write(step, {"train/loss": float(step)})
        sink.close()
        wandb.teardown()
    assert server.rewound_to == [4]
    assert [(row["progress/step"], row["train/loss"]) for row in server.history] == [(5, 5), (6, 6), (7, 7)]
    assert [row["_step"] for row in server.history] == ([5, 6, 7] if can_rewind else [9, 10, 11])


def test_offline_run_keeps_its_id(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = tmp_path / "运行 1"
    ids = []
    for first in (1, 3):
        sink = open_sink(run_dir, project="测试", first_step=first - 1)
        sink.write(first, {"train/loss": 1.0, "train/grad_norm": math.inf})
        sink.close()
        ids.append((run_dir / RUN_ID_FILE).read_text(encoding="utf-8"))
    assert ids[0] == ids[1]
    files = list(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert files and {file.name for file in files} == {f"run-{ids[0]}.wandb"}
    warned = [record.name for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [name for name in warned if name.startswith("megallama")]


def test_its_process_logs_into_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It logs to standard error, among the steps, where its cache folder cannot be written."""
    monkeypatch.setenv("WANDB_CACHE_DIR", "/proc/none")
    sink = open_sink(tmp_path)
    sink.write(1, {"train/loss": 1.0})
    sink.close()
    wandb.teardown()
    assert capfd.readouterr() == ("", "")
    assert "INFO" in (tmp_path / CORE_LOG).read_text(encoding="utf-8")


def test_failures_cost_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = open_sink(tmp_path, mode="offline")

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the service has gone")

    run = sink._run
    monkeypatch.setattr(run, "log", fail)
    for step in range(1, 4):
        sink.write(step, {"train/loss": 1.0})
    sink.close()
    run.finish()
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("megallama")]
    assert ours == ["Weights & Biases: logging failed (the service has gone); the run goes on without it"]


def test_unreachable_server_gives_an_offline_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr("megallama.metrics.wandb.INIT_TIMEOUT_S", 2)
    sink = open_sink(tmp_path, mode="online")
    sink.write(1, {"train/loss": 1.0})
    sink.close()
    assert "no online run" in caplog.text and "writing an offline run" in caplog.text
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_no_folder_to_write_never_raises(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    sink = WandbSink(tmp_path / "file", project="p", mode="offline", settings={}, first_step=0)
    sink.write(1, {"train/loss": 1.0})
    sink.close()
    assert "the run goes on without it" in caplog.text
