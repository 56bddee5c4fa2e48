"""A preparation that is killed, wherever and however often, ends with the bytes of an undisturbed one."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megallama.cli import main
from megallama.host.errors import UserError
from megallama.prepare.report import PrepareReport
from megallama.prepare.run import prepare
from tests.support.corpus import make_text

SETTINGS: dict[str, Any] = {
    "validation_fraction": 0.1,
    "shard_tokens": 20_000,
    "max_damaged": 5,
    "unit_bytes": 30_000,
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of file, Chinese in all of them, some damaged records."""
    folder = tmp_path_factory.mktemp("mixed")
    texts = [make_text(number) for number in range(300)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (folder / "a.jsonl").write_text(
        "\n".join([*lines[:90], '{"body": "无"}', *lines[90:100]]), encoding="utf-8"
    )
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[100:150]).encode()))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress("\n".join(lines[150:200]).encode()))
    table = pyarrow.table({"text": [*texts[200:240], None, *texts[240:260]]})
    pyarrow.parquet.write_table(table, folder / "d.parquet", row_group_size=10)
    for number in range(260, 300):
        (folder / f"文件{number}.txt").write_text(texts[number], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def undisturbed(
    mixed: Path, tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What comes out when nothing happens."""
    out = tmp_path_factory.mktemp("undisturbed")
    report = prepare([mixed], out, tokenizer=tokenizer_path, workers=1, **SETTINGS)
    assert report.train.documents + report.validation.documents == 300  # type: ignore[union-attr]
    assert len(report.damaged) == 2 and report.train.shards > 2
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    assert all(path.is_file() for path in folder.iterdir()), list(folder.iterdir())
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def completed(mixed: Path, out: Path, tokenizer: Path, *, workers: int = 1) -> PrepareReport | None:
    """The same preparation to its end; None where the killed one had got there."""
    try:
        return prepare([mixed], out, tokenizer=tokenizer, workers=workers, **SETTINGS)
    except UserError as error:
        assert "holds prepared data already" in str(error)
        return None


RUN = """
import json, sys
from megallama.cli import main
from megallama.prepare.run import prepare
inputs, output, tokenizer, settings = sys.argv[1:]
print("loaded", flush=True)
prepare([inputs], output, tokenizer=tokenizer, **json.loads(settings))
"""


def start(mixed: Path, out: Path, tokenizer: Path, *, workers: int) -> subprocess.Popen[str]:
    settings = json.dumps({**SETTINGS, "workers": workers})
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", RUN, str(mixed), str(out), str(tokenizer), settings],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "loaded\n"
    return process


def finished_units(out: Path) -> int:
    return sum("." not in path.name for path in (out / ".preparing" / "units").glob("*/*"))


@pytest.mark.long
def test_killed_at_20_random_instants(
    mixed: Path, undisturbed: dict[str, bytes], tokenizer_path: Path, tmp_path: Path
) -> None:
    draws = random.Random(5)
    durations = {}
    for workers in (1, 2):
        process = start(mixed, tmp_path / f"timed{workers}", tokenizer_path, workers=workers)
        begin = time.monotonic()
        process.communicate()
        durations[workers] = time.monotonic() - begin
        assert contents(tmp_path / f"timed{workers}") == undisturbed
    resumed = 0
    for number in range(20):
        out, workers = tmp_path / f"out{number}", 1 + number % 2
        process = start(mixed, out, tokenizer_path, workers=workers)
        if number < 10:  # anywhere, start and end included
            time.sleep(draws.uniform(0, durations[workers]))
        else:  # wherever this machine spends its time, within the work
            wanted = draws.randint(1, 5)
            while finished_units(out) < wanted and process.poll() is None:
                time.sleep(0.0005)
            time.sleep(draws.uniform(0, 0.01))
        with contextlib.suppress(ProcessLookupError):  # it was done
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        report = completed(mixed, out, tokenizer_path)
        resumed += report is not None and report.resumed_bytes > 0
        assert contents(out) == undisturbed, number
    assert resumed >= 3, "the instants must lie in the work"


def killed_at_call(number: int, run: Callable[[], object]) -> bool:
    """Runs in a process that is killed before its `number`th change of the disk; whether it got that far."""
    child = os.fork()
    if child == 0:
        left = number

        def dying(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return call

        os.replace, os.fsync, os.unlink = dying(os.replace), dying(os.fsync), dying(os.unlink)  # type: ignore[assignment]
        os.mkdir, os.rmdir, shutil.rmtree = dying(os.mkdir), dying(os.rmdir), dying(shutil.rmtree)  # type: ignore[assignment]
        try:
            run()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_killed_before_every_change_of_the_disk(tokenizer_path: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": make_text(n)}) + "\n" for n in range(30)), encoding="utf-8")
    older = tmp_path / "older.txt"
    older.write_text("旧的数据\n\n" * 50, encoding="utf-8")
    settings: dict[str, Any] = {"tokenizer": tokenizer_path, "validation_fraction": 0.3, "workers": 1}

    def run(out: Path) -> PrepareReport:
        return prepare([corpus], out, unit_bytes=16_000, shard_tokens=6000, overwrite=True, **settings)

    run(tmp_path / "expected")
    expected = contents(tmp_path / "expected")
    number = 0
    while True:
        number += 1
        out = tmp_path / f"out{number}"
        # Older data of another form is replaced by new data, or stays.
        prepare([older], out, documents="blank_line", **settings)
        before = contents(out)
        was_killed = killed_at_call(number, lambda out=out: run(out))  # type: ignore[misc]
        if not (out / ".preparing" / "publish.json").exists():
            found = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
            assert found in (before, expected), number
        run(out)
        assert contents(out) == expected, number
        shutil.rmtree(out)
        if not was_killed:
            break
    assert number > 30


def test_killed_while_its_files_got_their_names_it_is_completed_by_the_same_command(
    mixed: Path, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fraction = ["--validation-fraction", "0.1"]
    words = [
        "prepare",
        str(mixed),
        "--tokenizer",
        str(tokenizer_path),
        "--workers",
        "1",
        "--max-damaged",
        "5",
    ]
    assert main([*words, *fraction, "--output", str(tmp_path / "whole")]) == 0
    expected, shown = contents(tmp_path / "whole"), capsys.readouterr().out

    number = 0

    def killed(out: Path) -> None:
        nonlocal number
        plan, number = out / ".preparing" / "publish.json", max(0, number - 3)
        while not (plan.exists() and (out / "train.bin").exists()):
            shutil.rmtree(out, ignore_errors=True)
            number += 1
            assert killed_at_call(number, lambda: main([*words, *fraction, "--output", str(out)]))
        assert not (out / "train.json").exists()

    out = tmp_path / "同"
    killed(out)
    assert main([*words, *fraction, "--output", str(out)]) == 0
    told = capsys.readouterr().out
    assert "interrupted at its very end: its files have their names now" in told
    assert contents(out) == expected and not (out / ".preparing").exists()
    # And otherwise it tells what the whole one told.
    assert [line for line in told.splitlines() if "very end" not in line] == [
        line.replace(str(tmp_path / "whole"), str(out)) for line in shown.splitlines()
    ]
    for name, other in (("份额", ["--validation-fraction", "0.2"]), ("种子", [*fraction, "--seed", "7"])):
        out = tmp_path / name
        killed(out)
        assert main([*words, *other, "--output", str(out)]) == 2
        assert "holds prepared data already" in capsys.readouterr().err
        assert contents(out) == expected
        assert main([*words, *other, "--output", str(out), "--overwrite"]) == 0
        assert contents(out) != expected


def test_a_mended_file_costs_only_its_own_units(tokenizer_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "abc":
        texts = [json.dumps({"text": make_text(ord(name) + n)}, ensure_ascii=False) for n in range(20)]
        (folder / f"{name}.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    whole = (folder / "c.jsonl").read_bytes()
    (folder / "c.jsonl").write_bytes(whole + b'{"text": \n')
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"c\.jsonl line 21 is not JSON"):
        prepare([folder], out, tokenizer=tokenizer_path, workers=1, unit_bytes=10_000)
    (folder / "c.jsonl").write_bytes(whole)
    report = prepare([folder], out, tokenizer=tokenizer_path, workers=1, unit_bytes=10_000)
    kept = sum((folder / f"{name}.jsonl").stat().st_size for name in "ab")
    assert kept - 10_000 < report.resumed_bytes < kept + 10_000
    prepare([folder], tmp_path / "fresh", tokenizer=tokenizer_path, workers=1)
    assert contents(out) == contents(tmp_path / "fresh")


def test_what_was_tokenized_with_other_settings_is_not_taken(
    mixed: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare([mixed], out, tokenizer=tokenizer_path, workers=1, progress=interrupt, **SETTINGS)
    assert (out / ".preparing").is_dir()
    other = prepare([mixed], out, tokenizer=tokenizer_path, workers=1, seed=7, **SETTINGS)
    assert other.resumed_bytes == 0
    fresh = tmp_path / "fresh"
    prepare([mixed], fresh, tokenizer=tokenizer_path, workers=1, seed=7, **SETTINGS)
    assert contents(out) == contents(fresh)
