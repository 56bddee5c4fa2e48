"""A file is the old one or the new one, and on the disk before it gets its name."""

import os
from pathlib import Path

import pytest

from megallama.host.files import replacing, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("has_rivals", [False, True])
def test_the_old_file_stays_until_the_new_one_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_rivals: bool
) -> None:
    path, calls = tmp_path / "file", []
    write_whole(path, b"old", has_rivals=has_rivals)
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(("fsync", path.read_bytes())) or fsync(fd))
    monkeypatch.setattr(
        os, "replace", lambda a, b: calls.append(("replace", a.read_bytes())) or replace(a, b)
    )
    write_whole(path, b"new", has_rivals=has_rivals)
    assert calls == [("fsync", b"old"), ("replace", b"new")]
    assert path.read_bytes() == b"new" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("has_rivals", [False, True])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, has_rivals: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path, has_rivals=has_rivals) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_rivals_do_not_write_into_one_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path, has_rivals=True) as one, replacing(path, has_rivals=True) as other:
        one.write(b"one")
        other.write(b"other")
    assert path.read_bytes() == b"one" and names(tmp_path) == ["file"]


def test_it_may_be_read_by_whom_the_user_lets(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", b"", has_rivals=True)
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
