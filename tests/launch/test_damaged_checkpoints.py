"""Damaged checkpoints met by the real entry: the newest intact one is used, or one message and exit code 2."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megallama.checkpoint.format.record import new_digest
from megallama.host.errors import EXIT_USER_ERROR
from tests.launch.conftest import Workplace
from tests.launch.entry import Outcome, megallama_command, run_command, train_command
from tests.support.jobs import metrics, train
from tests.support.ranks import run_ranks

NEWEST, OLDER = "step-00000004", "step-00000002"


@pytest.fixture(scope="module")
def finished(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace with a run of 4 steps on two ranks and its checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("finished") / "work"
    shutil.copytree(prepared, folder)
    places = [f"data.sources=[{folder}/data/train]", f"data.tokenizer={folder}/tokenizer"]
    places.append(f"train.run_dir={folder}/runs/one")
    run_ranks(2, train, [*Workplace(folder).arguments, *places, "checkpoint.interval=2"])
    return folder


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Workplace:
    """A copy of `finished` that the test may spoil."""
    shutil.copytree(finished, tmp_path / "work")
    return Workplace(tmp_path / "work")


def go_on(place: Workplace, *words: str) -> Outcome:
    """The same run for two steps more, on one rank."""
    arguments = [*place.arguments, "train.steps=6", "checkpoint.interval=0", *words]
    return run_command(train_command, arguments, folder=place.folder)


def flip(file: Path) -> None:
    """One bit in the middle."""
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 16
    file.write_bytes(raw)


def exchange(file: Path) -> None:
    """With the file of the older checkpoint."""
    older = file.parents[1] / OLDER / file.name
    shutil.copyfile(older, file)


def to_link(file: Path) -> None:
    file.rename(file.with_suffix(".moved"))
    file.symlink_to(file.with_suffix(".moved"))


FAULTS: dict[str, Callable[[Path], None]] = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size - 1),
    "one bit flipped": flip,
    "missing": Path.unlink,
    "empty": lambda file: os.truncate(file, 0),
    "swapped": exchange,
    "garbage": lambda file: file.write_bytes(os.urandom(4096)) and None,
    "link": to_link,
}
FILES = ("manifest.json", "index.json", "rank-00000.bin", "rank-00001.bin")


@pytest.mark.parametrize("name", FILES)
def test_the_newest_intact_checkpoint_is_used(name: str, place: Workplace) -> None:
    """The faults take turns over the files; `tests/checkpoint/format/test_damage.py` has every pair."""
    fault = list(FAULTS)[FILES.index(name)]
    checkpoints = place.run_dir / "checkpoints"
    FAULTS[fault](checkpoints / NEWEST / name)
    outcome = go_on(place)
    assert outcome.code == 0 and "Traceback" not in outcome.output, outcome.output
    lines = [line for line in outcome.output.splitlines() if "damaged" in line]
    assert len(lines) == 1 and NEWEST in lines[0] and name in lines[0] and "skipped" in lines[0], (
        outcome.output
    )
    log = (place.run_dir / "log" / "rank-00000.log").read_text(encoding="utf-8")
    assert f"{OLDER} at step 2" in log
    assert [line["progress/step"] for line in metrics(place.run_dir)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("fault", list(FAULTS)[4:])
def test_further_faults(fault: str, place: Workplace) -> None:
    FAULTS[fault](place.run_dir / "checkpoints" / NEWEST / "rank-00001.bin")
    outcome = go_on(place)
    assert outcome.code == 0 and "Traceback" not in outcome.output, outcome.output
    assert outcome.output.count("damaged (rank-00001.bin") == 1, outcome.output


def assert_one_message(outcome: Outcome, *expected: str) -> None:
    assert outcome.code == EXIT_USER_ERROR, outcome.output
    assert len(outcome.errors) == 1 and "Traceback" not in outcome.output, outcome.output
    assert all(text in outcome.errors[0] for text in expected), outcome.errors


def test_no_intact_checkpoint(place: Workplace) -> None:
    for step in (NEWEST, OLDER):
        flip(place.run_dir / "checkpoints" / step / "rank-00000.bin")
    assert_one_message(go_on(place), "no intact checkpoint", NEWEST, OLDER, "restore one, or move")
    verified = run_command(megallama_command, ["checkpoint", "verify", "runs/one"], folder=place.folder)
    assert verified.code == 1 and verified.output.count("rank-00000.bin does not match its checksum") == 2


def test_another_model(place: Workplace) -> None:
    words = ("model.num_layers=2", "model.rope_theta=5e5")
    assert_one_message(
        go_on(place, *words), "model.num_layers 4 there, 2 here", "model.rope_theta 10000.0 there"
    )
    (place.run_dir / "config.yaml").unlink()
    assert_one_message(
        go_on(place, *words), "num_layers: 4 there, 2 here; rope_theta: 10000.0 there, 500000.0 here"
    )


def rewrite_state(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Alters the state as somebody would who also fixes the checksum."""
    body = json.loads((path / "manifest.json").read_bytes())
    body.pop("checksum")
    change(body["state"])
    head = json.dumps(body).removesuffix("}").encode() + b", "
    digest = new_digest()
    digest.update(head)
    (path / "manifest.json").write_bytes(head + f'"checksum": "{digest.hexdigest()}"\n}}\n'.encode())


LIES: dict[str, tuple[Callable[[dict[str, object]], object], str]] = {
    "no progress": (lambda state: state.pop("progress"), "holds only weights"),
    "progress of another kind": (lambda state: state.update(progress=[1]), "progress in "),
    "negative count": (lambda state: state["progress"].update(step=-1), "is not valid in this version"),  # type: ignore[attr-defined]
    "text for a count": (lambda state: state["progress"].update(step="4"), "is not valid in this version"),  # type: ignore[attr-defined]
    "another step": (lambda state: state["progress"].update(step=3), "is of another step"),  # type: ignore[attr-defined]
    "no engine": (lambda state: state.pop("engine"), "engine's state in "),
    "engine of another kind": (lambda state: state.update(engine={"adam_step": "x"}), "engine's state in "),
    "record of another kind": (
        lambda state: state.update(data=[1]),
        "record of consumed data has version None",
    ),
    "record without its parts": (
        lambda state: state.update(data={"version": 1}),
        "record of consumed data is damaged",
    ),
    "unknown counter": (lambda state: state["engine"].update(more=1), "engine's state in "),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("lie", LIES)
def test_a_state_that_is_none(lie: str, place: Workplace) -> None:
    change, expected = LIES[lie]
    rewrite_state(place.run_dir / "checkpoints" / NEWEST, change)
    assert_one_message(go_on(place), expected)


def test_other_files_of_the_run_folder_are_no_obstacle(place: Workplace) -> None:
    """All of them damaged at once: the checkpoint is all that a resume needs."""
    folder = place.run_dir
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(lines[0] + b"\xff\x00 garbage {\n" + b"".join(lines[2:]))
    for name in ("config.yaml", "data.json", "tokenizer/tokenizer.model", "log/rank-00000.log", ".lock"):
        (folder / name).write_bytes(b"\xff\x00: [")
    outcome = go_on(place)
    assert outcome.code == 0 and "Traceback" not in outcome.output, outcome.output
    assert (
        f"{folder}/metrics.jsonl: line 2 cannot be read and moved to metrics.jsonl.damaged" in outcome.output
    )
    assert [line["progress/step"] for line in metrics(folder)] == [1, 3, 4, 5, 6]
    traced = run_command(
        megallama_command, ["data", "trace", "runs/one", "--step=2", "--row=0"], folder=place.folder
    )
    assert traced.code == 0 and "row 0" in traced.output, traced.output


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "data.json", "tokenizer/tokenizer.model"])
def test_a_folder_in_the_place_of_a_file(name: str, place: Workplace) -> None:
    (place.run_dir / name).unlink()
    (place.run_dir / name).mkdir()
    assert_one_message(go_on(place), "cannot be written", "Is a directory")


def test_weights_of_another_run(place: Workplace) -> None:
    words = ["train.run_dir=runs/two", "train.init_from=runs/one"]
    assert_one_message(
        go_on(place, *words, "model.num_layers=2"), "train.init_from (", "num_layers: 4 there, 2 here"
    )
    assert_one_message(
        go_on(place, *words[:1], "train.init_from=runs/none"), "train.init_from (", "no checkpoint"
    )
    assert not (place.folder / "runs" / "two").exists()
    flip(place.run_dir / "checkpoints" / NEWEST / "rank-00000.bin")
    named = f"train.init_from=runs/one/checkpoints/{NEWEST}"
    assert_one_message(
        go_on(place, words[0], named), "is damaged (rank-00000.bin does not match", "use another one"
    )
    outcome = go_on(place, *words)
    assert outcome.code == 0, outcome.output
    log = (place.folder / "runs" / "two" / "log" / "rank-00000.log").read_text(encoding="utf-8")
    assert f"weights from {place.run_dir}/checkpoints/{OLDER}, fresh optimizer" in log
