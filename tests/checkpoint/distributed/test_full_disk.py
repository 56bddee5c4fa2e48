"""The disk is full at one call of the system: at each one in turn, with and without a background save."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.checkpoint.distributed import storage
from megallama.checkpoint.distributed.background import BackgroundSaver
from megallama.checkpoint.distributed.store import load_checkpoint, save_checkpoint
from megallama.checkpoint.format.boxes import BoxedTensor
from megallama.checkpoint.format.integrity import latest_checkpoint, verify_checkpoint
from megallama.checkpoint.format.protocol import find_checkpoints
from megallama.host.errors import UserError

CALLS = ("open", "write", "fsync", "replace", "mkdir")


@contextmanager
def replaced(calls: Mapping[str, Any]) -> Iterator[None]:
    """Functions of `os` are others within the block."""
    with pytest.MonkeyPatch.context() as patch:
        for name, function in calls.items():
            patch.setattr(os, name, function)
        yield


@contextmanager
def full_at(number: int, folder: Path) -> Iterator[list[str]]:
    """The call with this number (from 1) that writes below `folder` fails; yields the calls so far by name."""
    known = {name: getattr(os, name) for name in CALLS}
    opened: set[int] = set()
    made: list[str] = []
    lock = threading.Lock()

    def wrapped(name: str) -> Any:
        def call(first: Any, *args: Any, **kwargs: Any) -> Any:
            is_ours = first in opened if isinstance(first, int) else str(first).startswith(str(folder))
            if name == "open" and not args[0] & os.O_CREAT:  # reading, but a directory is then synchronised
                is_ours = False
            if is_ours:
                with lock:
                    made.append(name)
                    if len(made) == number:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            result = known[name](first, *args, **kwargs)
            if name == "open" and str(first).startswith(str(folder)):
                opened.add(result)
            return result

        return call

    with replaced({name: wrapped(name) for name in known}):
        yield made


@contextmanager
def noted_calls() -> Iterator[list[tuple[str, str]]]:
    """(call, name of the file or directory) of what is written, synchronised and renamed, in order."""
    known = {name: getattr(os, name) for name in ("open", "write", "fsync", "replace")}
    names: dict[int, str] = {}
    noted: list[tuple[str, str]] = []

    def note(name: str) -> Any:
        def call(first: Any, *args: Any, **kwargs: Any) -> Any:
            result = known[name](first, *args, **kwargs)
            if name == "open":
                names[result] = Path(first).name
            elif name == "replace":
                noted.append((name, Path(first).name))
            else:
                noted.append((name, names[first]))
            return result

        return call

    with replaced({name: note(name) for name in known}):
        yield noted


def test_everything_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "WRITE_BYTES", 16 * 1024)
    with noted_calls() as noted:
        save_first(tmp_path / "saved")
    temporary = noted[-2][1]
    assert temporary.startswith(".tmp-step-00000001-")
    assert noted[-3:] == [("fsync", temporary), ("replace", temporary), ("fsync", "saved")]
    files = ["rank-00000.bin", "index.json", "manifest.json"]
    # Each file is synchronised right after its last byte, before the next one is begun; the manifest is the last.
    assert [name for call, name in noted[:-3] if call == "fsync"] == files
    last = {name: index for index, (call, name) in enumerate(noted) if call == "write"}
    assert all(noted[last[name] + 1] == ("fsync", name) for name in files)


def tensors_of(step: int) -> dict[str, BoxedTensor]:
    """Three boxes of 16 KiB."""
    return {
        f"{kind}/w": BoxedTensor(
            f"{kind}/w", (4096,), torch.float32, True, {(0,): torch.full((4096,), float(step))}
        )
        for kind in ("fp32", "exp_avg", "exp_avg_sq")
    }


def save_first(directory: Path) -> Path:
    return save_checkpoint(directory, step=1, tensors=tensors_of(1), state={}, model={}, keep=0)


def loaded_step(path: Path) -> int:
    """Of which step every single element is."""
    tensors = tensors_of(0)
    load_checkpoint(path, tensors=tensors, model={})
    (value,) = {number for tensor in tensors.values() for number in tensor.boxes[(0,)].tolist()}
    return int(value)


def save_second(directory: Path, *, in_background: bool) -> str | None:
    """Saves step 2; the one message, or None."""
    saver = BackgroundSaver(directory, model={}, keep=0)
    arguments: dict[str, Any] = {"step": 2, "tensors": tensors_of(2), "state": {}}
    if in_background:
        saver.start(**arguments)
        outcome = saver.wait()
        assert outcome is not None
        return outcome.problem
    try:
        saver.save_now(**arguments)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("in_background", [False, True], ids=["sync", "background"])
def test_full_at_each_call(
    in_background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(storage, "WRITE_BYTES", 16 * 1024)
    save_first(tmp_path / "whole")
    with full_at(0, tmp_path) as made:
        assert save_second(tmp_path / "whole", in_background=in_background) is None
    calls = list(made)
    assert len(calls) >= 15 and set(calls) == set(CALLS)
    assert (calls[0], calls[-2:]) == ("mkdir", ["replace", "fsync"])
    # The first call makes the directory that is there already.
    for number in range(2, len(calls) + 1):
        directory = tmp_path / f"{number}"
        first = save_first(directory)
        with full_at(number, tmp_path) as made:
            message = save_second(directory, in_background=in_background)
        place = f"call {number}, {made[number - 1]}"
        assert message is not None and "No space left on device" in message, place
        assert "\n" not in message and "rror:" not in message, (place, message)
        assert verify_checkpoint(first) == [], place
        # Only the wait for the rename to be on the disk can fail once the new checkpoint is complete.
        is_complete = number == len(calls)
        assert find_checkpoints(directory) == ([1, 2] if is_complete else [1]), place
        lines: list[str] = []
        newest = latest_checkpoint(directory, log=lines.append)
        assert newest is not None and lines == [], place
        assert loaded_step(newest) == (2 if is_complete else 1), place
        assert save_second(directory, in_background=in_background) is None
        assert sorted(path.name for path in directory.iterdir()) == ["step-00000001", "step-00000002"], place
    assert "Traceback" not in capfd.readouterr().err
