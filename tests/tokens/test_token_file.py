"""An opened token file whose pair changes under it, and views that outlive it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megallama.host.errors import UserError
from megallama.stream.source import JoinedSource
from megallama.tokens.token_file import TokenFile, write_token_file


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """3000 documents of 3 tokens, so both files have several pages."""
    write_token_file(tmp_path / "文", ([3 * n, 3 * n + 1, 3 * n + 2] for n in range(3000)))
    return tmp_path / "文"


def ends_well(does: Callable[[], None]) -> bool:
    """Whether a child process comes to the end of `does`: what this is about kills without an exception."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            does()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_view_outlives_its_file(prefix: Path) -> None:
    def reads() -> None:
        view = TokenFile(prefix).view(5000, 4000)
        (joined,) = JoinedSource("源", [TokenFile(prefix)]).views(8990, 10)
        gc.collect()
        assert view.tolist() == list(range(5000, 9000)) and joined.tolist() == list(range(8990, 9000))

    assert ends_well(reads)


def test_a_file_that_another_took_the_name_of_is_read_on(prefix: Path) -> None:
    """What is mapped is the old file, also if the new one is shorter, or there is none."""
    file = TokenFile(prefix)
    wanted = file.view(8000, 4).tolist()
    other = prefix.with_name("other")
    other.write_bytes(b"short")
    other.replace(f"{prefix}.bin")
    assert file.view(8000, 4).tolist() == wanted
    os.unlink(f"{prefix}.idx")
    assert len(file.document_starts(0, 2)) == 2


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_file_cut_short_while_it_is_in_use_is_named(prefix: Path, suffix: str) -> None:
    def reads() -> None:
        source = JoinedSource("源", [TokenFile(prefix)])
        path = f"{prefix}{suffix}"
        size = os.path.getsize(path)
        os.truncate(path, 100)
        message = rf"文{suffix} was truncated while it was in use \(100 bytes, {size} when it was opened\)"
        with pytest.raises(UserError, match=message):
            if suffix == ".bin":
                list(source.views(8000, 100))
            else:
                source.document_starts(8000, 100)
        if suffix == ".idx":
            with pytest.raises(UserError, match=message):
                list(source.document_starts_in_parts())

    assert ends_well(reads)


def test_a_file_that_only_grows_is_read_on(prefix: Path) -> None:
    source = JoinedSource("源", [TokenFile(prefix)])
    with open(f"{prefix}.bin", "ab") as stream:
        stream.write(b"more")
    (view,) = source.views(8000, 1000)
    assert view.tolist() == list(range(8000, 9000))
