"""Many files: mapped ones take no descriptor, the limit is raised, and beyond it there is one message."""

import errno
import gc
import os
import resource

import numpy as np
import pytest

from megallama.cli import main
from megallama.host.limits import map_file, raise_limit
from megallama.tokens.token_file import TokenFile
from tests.support.jobs import write_dataset


@pytest.fixture
def limit():
    """Sets the soft limit of open files for a test."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda soft: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def num_open():
    return len(os.listdir("/proc/self/fd"))


def num_mapped(path):
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return maps.read().count(str(path))


def test_what_is_mapped_stays_as_long_as_somebody_holds_it(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)) * 100)
    before = num_open()
    part = np.frombuffer(map_file(path), np.uint8)[150:250]
    assert num_open() == before and num_mapped(path) == 1
    path.rename(tmp_path / "elsewhere")
    gc.collect()
    assert part.tolist() == [*range(150, 200), *range(50)] and not part.flags.writeable
    del part
    gc.collect()
    assert num_mapped(tmp_path) == 0
    (tmp_path / "empty").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        map_file(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        map_file(tmp_path / "none")


def test_six_hundred_shards_under_a_limit_of_few_files(tmp_path, limit):
    write_dataset(tmp_path / "train")
    (start,) = TokenFile(tmp_path / "train").document_starts(1, 2)
    limit(num_open() + 16)
    files = [TokenFile(tmp_path / "train") for _ in range(600)]
    assert all(int(file.document_starts(1, 2)[0]) == int(start) for file in files)
    assert all(file.view(0, 4).tolist() == files[0].view(0, 4).tolist() for file in files)


def test_the_limit_is_raised_to_what_the_machine_allows(limit):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limit(300)
    raise_limit()
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert soft == (1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16))
    limit(hard if hard != resource.RLIM_INFINITY else 1 << 17)
    raise_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= soft, "a higher limit is left as it is"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_too_many_open_files_are_one_message(number, monkeypatch, capsys):
    def command(options):
        raise OSError(number, "Too many open files", "data/train.bin")

    monkeypatch.setattr("megallama.commands.generate._generate", command)
    assert main(["generate", "run", "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: too many open files (this process may open") and "ulimit -n 65536" in error
    )
    assert len(error.splitlines()) == 1 and "data/train.bin" in error


def test_another_error_is_no_such_message(monkeypatch):
    def command(options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("megallama.commands.generate._generate", command)
    with pytest.raises(OSError, match="Input/output"):
        main(["generate", "run", "--prompt", "a"])
