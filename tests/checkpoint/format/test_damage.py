"""Every fault of every file is named, and the newest intact checkpoint is used instead."""

import json
import os
import re
import shutil
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from megallama.checkpoint.format.integrity import latest_checkpoint, verify_checkpoint
from megallama.checkpoint.format.protocol import find_checkpoints
from megallama.checkpoint.format.record import decode_index, decode_manifest, new_digest
from megallama.checkpoint.offline.reader import CheckpointReader
from megallama.host.errors import DamagedError, UserError
from tests.checkpoint.ranks_at_work import latest_on_rank, load, load_on_rank, save, save_on_rank
from tests.checkpoint.synthetic import STATE, Layout
from tests.support.ranks import run_ranks

LAYOUT = Layout(2, 2)
FILES = ("manifest.json", "index.json", "rank-00000.bin", "rank-00003.bin")


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("两个")
    run_ranks(4, save_on_rank, directory, LAYOUT, 1)
    run_ranks(4, save_on_rank, directory, LAYOUT, 2)
    return directory


@pytest.fixture
def directory(two_saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_saved, tmp_path / "checkpoints"))


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip_first_bit(file: Path) -> None:
    flip(file, 0)


def flip_middle_bit(file: Path) -> None:
    flip(file, file.stat().st_size // 2)


def flip(file: Path, position: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[position] ^= 1
    file.write_bytes(raw)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def become_garbage(file: Path) -> None:
    file.write_bytes(b'{"format": ' + os.urandom(file.stat().st_size))


def append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def exchange(file: Path) -> None:
    other = file.with_name("rank-00002.bin" if file.suffix == ".bin" else "rank-00000.bin")
    both = file.read_bytes(), other.read_bytes()
    file.write_bytes(both[1])
    other.write_bytes(both[0])


def take_from_older(file: Path) -> None:
    older = file.parents[1] / "step-00000001" / file.name
    # Same names and sizes: only digests can tell. Data that happen to be equal are no damage.
    flip(older, older.stat().st_size // 2) if older.read_bytes() == file.read_bytes() else None
    shutil.copyfile(older, file)


def become_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def become_link(file: Path) -> None:
    file.rename(file.parents[1] / "elsewhere")
    file.symlink_to(file.parents[1] / "elsewhere")


def become_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


FAULTS = (
    truncate,
    flip_first_bit,
    flip_middle_bit,
    Path.unlink,
    empty,
    append,
    become_garbage,
    exchange,
    take_from_older,
    become_directory,
    become_link,
    become_fifo,
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_damaged_file_is_named_and_the_older_checkpoint_taken(
    directory: Path, name: str, fault: Callable[[Path], None]
) -> None:
    path = directory / "step-00000002"
    assert verify_checkpoint(path) == []
    fault(path / name)
    problems = verify_checkpoint(path)
    assert any(name in problem for problem in problems), problems
    if fault is not take_from_older:
        lines: list[str] = []
        assert latest_checkpoint(directory, log=lines.append) == directory / "step-00000001"
        assert len(lines) == 1 and "step-00000002" in lines[0] and name in lines[0], lines
        assert load(directory / "step-00000001", Layout(1, 1)) == (0, STATE)
        with pytest.raises(DamagedError, match=f"step-00000002 is damaged .*{name}"):
            dict(CheckpointReader(path, verify="first").read_all())


def test_loading_reports_damage_without_a_digest(directory: Path) -> None:
    path = directory / "step-00000002"
    truncate(path / "rank-00001.bin")
    for attempt in (lambda: load(path, Layout(1, 1)), lambda: CheckpointReader(path)):
        with pytest.raises(
            DamagedError, match=r"step-00000002 is damaged \(rank-00001.bin has .*use an older"
        ):
            attempt()
    with pytest.raises(AssertionError, match="DamagedError: checkpoint .*rank-00001.bin"):
        run_ranks(2, load_on_rank, path, Layout(2, 1))


def test_an_extra_file_is_named_and_does_no_harm(directory: Path) -> None:
    path = directory / "step-00000002"
    (path / "notes.txt").write_text("mine", encoding="utf-8")
    assert verify_checkpoint(path) == ["notes.txt does not belong to it"]
    lines: list[str] = []
    assert latest_checkpoint(directory, log=lines.append) == path
    assert lines == [] and load(path, Layout(1, 1)) == (0, STATE)


def test_ranks_share_the_reading_and_agree(directory: Path) -> None:
    flip_middle_bit(directory / "step-00000002" / "rank-00003.bin")
    results = run_ranks(3, latest_on_rank, directory)
    assert {path for path, _ in results} == {str(directory / "step-00000001")}
    assert [len(lines) for _, lines in results] == [1, 0, 0]
    assert results[0][1][0].endswith("(rank-00003.bin does not match its checksum): skipped")


def test_nothing_intact_is_an_error_and_nothing_at_all_is_not(directory: Path, tmp_path: Path) -> None:
    for step in (1, 2):
        (directory / f"step-{step:08d}" / "manifest.json").unlink()
    with pytest.raises(UserError, match="no intact checkpoint .*step-00000002, step-00000001.*: restore one"):
        latest_checkpoint(directory, log=lambda _: None)
    assert latest_checkpoint(tmp_path / "new", log=lambda _: None) is None
    assert verify_checkpoint(tmp_path / "new") == [
        f"no checkpoint at {tmp_path / 'new'}: give a step-... directory"
    ]


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Alters the manifest as somebody would who also fixes its checksum."""
    body = json.loads((path / "manifest.json").read_bytes())
    body.pop("checksum")
    change(body)
    head = json.dumps(body).removesuffix("}").encode() + b", "
    digest = new_digest()
    digest.update(head)
    (path / "manifest.json").write_bytes(head + f'"checksum": "{digest.hexdigest()}"\n}}\n'.encode())


MANIFEST_LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "larger": (lambda m: m["files"]["rank-00001.bin"].update(bytes=1 << 40), "rank-00001.bin has .* says"),
    "smaller": (lambda m: m["files"]["rank-00001.bin"].update(bytes=64), "rank-00001.bin"),
    "index larger": (lambda m: m["files"]["index.json"].update(bytes=1 << 40), "index.json has .* says"),
    "index smaller": (lambda m: m["files"]["index.json"].update(bytes=9), "index.json has .* at most 9"),
    "index of another": (
        lambda m: m["files"].update({"index.json": m["files"]["rank-00001.bin"]}),
        "index.json has",
    ),
    "negative": (lambda m: m["files"]["rank-00001.bin"].update(bytes=-1), "rank-00001.bin is malformed"),
    "text": (lambda m: m["files"]["rank-00001.bin"].update(bytes="9"), "rank-00001.bin is malformed"),
    "digest": (
        lambda m: m["files"]["rank-00001.bin"].update(blake3="0" * 64),
        "does not match its checksum",
    ),
    "short digest": (lambda m: m["files"]["rank-00001.bin"].update(blake3="0"), "is malformed"),
    "unlisted": (lambda m: m["files"].pop("rank-00001.bin"), "rank-00001.bin"),
    "no index": (lambda m: m["files"].pop("index.json"), "index.json is not listed"),
    "parent": (
        lambda m: m["files"].update({"../rank-00001.bin": m["files"]["rank-00001.bin"]}),
        "not allowed",
    ),
    "absolute": (lambda m: m["files"].update({"/etc/passwd": m["files"]["rank-00001.bin"]}), "not allowed"),
    "newline": (
        lambda m: m["files"].update({"rank-00001.bin\n": m["files"]["rank-00001.bin"]}),
        "not allowed",
    ),
    "step": (lambda m: m.update(step=3), "of step 3, not of step-00000002"),
    "format": (lambda m: m.update(format="other"), "format is 'other'"),
    "files": (lambda m: m.update(files=[]), "files is malformed"),
    "state": (lambda m: m.update(state=None), "state is malformed"),
}


@pytest.mark.parametrize("lie", MANIFEST_LIES)
def test_a_manifest_is_not_believed(directory: Path, lie: str) -> None:
    change, text = MANIFEST_LIES[lie]
    path = directory / "step-00000002"
    rewrite(path, change)
    with pytest.raises(
        DamagedError, match="only a digest tells" if lie == "digest" else "step-00000002 is damaged"
    ):
        load(path, Layout(1, 1))
        raise DamagedError("only a digest tells")  # loading takes latest_checkpoint's word for the contents
    [problem, *_] = verify_checkpoint(path)
    assert re.search(text, problem), problem
    lines: list[str] = []
    assert latest_checkpoint(directory, log=lines.append) == directory / "step-00000001"
    assert len(lines) == 1, lines


def test_a_newer_format_is_not_taken_for_damage(directory: Path) -> None:
    rewrite(directory / "step-00000002", lambda m: m.update(version=3))
    with pytest.raises(UserError, match=r"version 3.*update megallama"):
        latest_checkpoint(directory, log=lambda _: None)


def to_version_1(path: Path) -> None:
    """The checkpoint as version 1 of the format had it."""
    body = json.loads((path / "manifest.json").read_bytes())
    body.pop("checksum")
    body["version"] = 1
    body["files"] = {
        name: {
            "bytes": entry["bytes"],
            "blake2b": blake2b((path / name).read_bytes(), digest_size=32).hexdigest(),
        }
        for name, entry in body["files"].items()
    }
    head = json.dumps(body, indent=1, ensure_ascii=False).removesuffix("\n}").encode() + b",\n "
    checksum = blake2b(head, digest_size=32).hexdigest()
    (path / "manifest.json").write_bytes(head + f'"checksum": "{checksum}"\n}}\n'.encode())


def test_the_format_of_version_1_is_read_and_verified(directory: Path) -> None:
    for step in (1, 2):
        to_version_1(directory / f"step-{step:08d}")
    lines: list[str] = []
    path = directory / "step-00000002"
    assert verify_checkpoint(path) == [] and latest_checkpoint(directory, log=lines.append) == path
    assert load(path, Layout(1, 1)) == (0, STATE)
    assert len(list(CheckpointReader(path, verify="first").read_all())) > 0
    flip_middle_bit(path / "rank-00003.bin")
    assert verify_checkpoint(path) == ["rank-00003.bin does not match its checksum"]
    assert latest_checkpoint(directory, log=lines.append) == directory / "step-00000001"
    verified: set[int] = set()
    save(directory, Layout(1, 1), 3, keep=2, verified=verified)
    assert find_checkpoints(directory) == [2, 3] and verified == {3}


def test_a_version_says_which_digest_is_meant(directory: Path) -> None:
    path = directory / "step-00000002"
    raw = (path / "manifest.json").read_bytes()
    (path / "manifest.json").write_bytes(raw.replace(b'"version": 2', b'"version": 1'))
    assert verify_checkpoint(path) == ["manifest.json: checksum does not match the text"]


INDEX_LIES: dict[str, tuple[str, str]] = {
    "outside of the file": ('"boxes":[[0,0,', '"boxes":[[0,640000000,'),
    "unaligned": ('"boxes":[[0,0,', '"boxes":[[0,1,'),
    "other file": ('"boxes":[[0,0,', '"boxes":[[9,0,'),
    "negative": ('"boxes":[[0,0,', '"boxes":[[0,-64,'),
    "huge tensor": ('"shape":[1]', '"shape":[1000000000000]'),
    "hole": ('"shape":[1]', '"shape":[2]'),
    "dtype": ('"dtype":"float32"', '"dtype":"object"'),
    "dtype list": ('"dtype":"float32"', '"dtype":["float32"]'),
    "float": ('"shape":[1]', '"shape":[1.0]'),
    "no boxes": ('"boxes":[[0,0,', '"boxen":[[0,0,'),
}


@pytest.mark.parametrize("lie", INDEX_LIES)
def test_an_index_is_not_believed(directory: Path, lie: str) -> None:
    path = directory / "step-00000002"
    old, new = INDEX_LIES[lie]
    raw = (path / "index.json").read_text(encoding="utf-8")
    assert old in raw
    files = decode_manifest((path / "manifest.json").read_bytes()).files
    decode_index(raw.encode(), files=files)
    with pytest.raises(DamagedError, match=r"^index.json: "):
        decode_index(raw.replace(old, new, 1).encode(), files=files)


def test_many_boxes_over_the_same_bytes_do_not_make_a_large_tensor(directory: Path) -> None:
    path = directory / "step-00000002"
    files = decode_manifest((path / "manifest.json").read_bytes()).files
    boxes = [[0, 0, [n], [1]] for n in range(50_000)]
    raw = json.dumps({"tensors": {"fp32/w": {"dtype": "float64", "shape": [50_000], "boxes": boxes}}})
    with pytest.raises(DamagedError, match="larger than the files"):
        decode_index(raw.encode(), files=files)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"\xff", b'{"tensors": 1}', b"[" * 100_000, b"9" * 5000])
def test_what_is_not_an_index_is_refused(raw: bytes) -> None:
    with pytest.raises(DamagedError):
        decode_index(raw, files={})


def test_names_of_other_things_are_left_alone(tmp_path: Path) -> None:
    others = (".tmp-step-1-x", "tmp-step-00000001-00000000", "step-1", "step-00000001x", ".tmp-step-00000001")
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000009").write_text("a file", encoding="utf-8")
    assert find_checkpoints(tmp_path) == []
    save(tmp_path, Layout(1, 1), 3, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {*others, "step-00000003", "step-00000009"}
