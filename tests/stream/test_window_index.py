"""Where cut windows begin: built once, by one of many, whole or not at all."""

from __future__ import annotations

import multiprocessing
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megallama.host.errors import UserError
from megallama.stream import window_index
from megallama.stream.window_index import load_window_starts, window_starts
from tests.support.memory import Memory


def source() -> Memory:
    return Memory(([3, 9, 1, 5] * 500)[:1999])


def load_and_report(folder: str, gate: object, results: object) -> None:
    gate.wait()  # type: ignore[attr-defined]
    starts = load_window_starts(source(), seq_len=8, folder=Path(folder))
    results.put(starts.tolist())  # type: ignore[attr-defined]


def test_many_processes_share_one_index(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    gate, results = context.Barrier(4), context.Queue()
    processes = [
        context.Process(target=load_and_report, args=(str(tmp_path / "i"), gate, results)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    expected = list(window_starts(source(), seq_len=8))
    assert len(expected) > 500 and all(starts == expected for starts in found)
    assert [path.suffix for path in sorted((tmp_path / "i").iterdir())] == [".lock", ".starts"]


def test_it_is_built_once_and_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_window_starts(source(), seq_len=8, folder=tmp_path)
    monkeypatch.setattr(window_index, "_write", None)
    again = load_window_starts(source(), seq_len=8, folder=tmp_path)
    assert not again.flags.owndata and np.array_equal(first, again)


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(window_index, "_flush", full)
    with pytest.raises(UserError, match=r"index of data source 内存 cannot be kept in .* \(No space left"):
        load_window_starts(source(), seq_len=8, folder=tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    monkeypatch.undo()
    assert len(load_window_starts(source(), seq_len=8, folder=tmp_path)) > 500


def test_memory_does_not_grow_with_the_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_index, "_WINDOWS_AT_ONCE", 100)

    class Long(Memory):
        def document_starts_in_parts(self):  # type: ignore[no-untyped-def]
            for first in range(0, 10**6, 1000):
                yield np.arange(first, first + 1000, 5)

    long = Long([10**6])
    tracemalloc.start()
    load_window_starts(long, seq_len=5, folder=tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    buffer = 1 << 20
    assert peak < buffer + 200_000, "a list of all 200,000 windows would take 7 MB"


def test_no_document_fits(tmp_path: Path) -> None:
    assert len(load_window_starts(Memory([3]), seq_len=8, folder=tmp_path)) == 0


DAMAGE = {
    "truncated": lambda raw: raw[:-8],
    "cut within a number": lambda raw: raw[:-3],
    "one bit flipped": lambda raw: raw[:80] + bytes([raw[80] ^ 1]) + raw[81:],
    "empty": lambda raw: b"",
    "garbage": lambda raw: bytes(range(256)) * 4,
    "of an older version": lambda raw: raw[:-32],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_is_made_anew(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = list(window_starts(source(), seq_len=8))
    load_window_starts(source(), seq_len=8, folder=tmp_path)
    (path,) = tmp_path.glob("*.starts")
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[damage](whole))
    assert load_window_starts(source(), seq_len=8, folder=tmp_path).tolist() == expected
    assert path.read_bytes() == whole
    assert caplog.messages == [f"index {path} of data source 内存 is damaged: made anew"]
