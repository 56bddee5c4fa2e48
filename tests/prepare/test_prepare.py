"""Preparation: what is written, the split, determinism, and what is left when it fails or is killed."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megallama.cli import main
from megallama.corpus.corpus import Reading, expand_inputs
from megallama.host.errors import UserError
from megallama.prepare.encoding import draw_of, plan_units
from megallama.prepare.run import prepare
from megallama.prepare.token_writer import TokenWriter
from megallama.tokenizers.load import Tokenizer, load_tokenizer
from megallama.tokens.manifest import read_manifest, shard_prefixes
from megallama.tokens.origins import origin_of
from megallama.tokens.token_file import TokenFile
from tests.support.checksums import checksum_problems
from tests.support.corpus import make_text, write_corpus

FACTS = ["files.json", "prepared.json", "token-counts.npy"]
TRAIN_NAMES = [*FACTS, "train.bin", "train.idx", "train.json", "train.origins"]
ALL_NAMES = [*TRAIN_NAMES, "valid.bin", "valid.idx", "valid.json", "valid.origins"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def texts(prefix: Path, tokenizer: Tokenizer) -> list[str]:
    opened = TokenFile(prefix)
    found = []
    for document, length in enumerate(opened.document_lengths):
        ids = opened.read(document, start=0, count=int(length)).tolist()
        assert ids[-1] == tokenizer.eod_id and tokenizer.eod_id not in ids[:-1]
        found.append(tokenizer.decode(ids[:-1]))
    return found


def test_every_document_is_in_one_split_and_decodes_to_its_text(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    report = prepare(
        [corpus],
        tmp_path / "out",
        tokenizer=tokenizer.path,
        validation_fraction=0.25,
        workers=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert names(tmp_path / "out") == ALL_NAMES
    assert report.validation is not None
    train, valid = texts(report.train.prefix, tokenizer), texts(report.validation.prefix, tokenizer)
    assert sorted(train + valid) == sorted(make_text(number) for number in range(40))
    assert 4 <= len(valid) <= 18
    total = sum(path.stat().st_size for path in corpus.rglob("*.txt"))
    assert seen[-1] == (total, total) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert (report.source_files, report.source_bytes) == (40, total)
    for split in (report.train, report.validation):
        manifest = read_manifest(split.prefix)
        opened = TokenFile(split.prefix)
        assert manifest is not None
        assert manifest.tokenizer_sha256 == tokenizer.sha256
        assert (manifest.vocab_size, manifest.eod_id) == (500, 2)
        assert manifest.documents == split.documents == opened.num_documents
        assert manifest.tokens == split.tokens == opened.num_tokens
        assert manifest.bin_bytes == split.bin_bytes == 2 * opened.num_tokens
        assert manifest.bin_sha256 == hashlib.sha256(Path(f"{split.prefix}.bin").read_bytes()).hexdigest()
        assert checksum_problems(split.prefix) == []


def test_every_document_is_traced_to_its_place(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "in", files=3)
    lines = [json.dumps({"text": make_text(100 + number)}, ensure_ascii=False) for number in range(30)]
    raw = ("\n".join(lines) + "\n").encode()
    (folder / "文.jsonl").write_bytes(raw)
    (folder / "散.jsonl.gz").write_bytes(gzip.compress(raw.replace("中".encode(), "国".encode())))
    report = prepare(
        [folder],
        tmp_path / "out",
        tokenizer=tokenizer.path,
        validation_fraction=0.3,
        unit_bytes=700,
        shard_tokens=900,
        workers=1,
    )
    contents_of = {"文.jsonl": raw, "散.jsonl.gz": gzip.decompress((folder / "散.jsonl.gz").read_bytes())}
    seen = []
    assert report.validation is not None
    for split in (report.train, report.validation):
        assert split.shards > 1
        for prefix in shard_prefixes(split.prefix):
            for document, text in enumerate(texts(Path(prefix), tokenizer)):
                origin = origin_of(prefix, document)
                assert origin is not None
                seen.append(origin)
                name, _, place = origin.rpartition(":")
                if not name:
                    assert (folder / origin).read_text(encoding="utf-8") == text
                    continue
                line = contents_of[name][int(place) :].split(b"\n", 1)[0]
                assert json.loads(line)["text"] == text
    assert len(set(seen)) == len(seen) == 63


def test_without_a_record_the_origin_is_unknown(tmp_path: Path) -> None:
    assert origin_of(tmp_path / "absent", 0) is None
    (tmp_path / "short.origins").write_bytes(bytes(16))
    assert origin_of(tmp_path / "short", 0) is None
    (tmp_path / "files.json").write_text('["a.txt"]', encoding="utf-8")
    assert origin_of(tmp_path / "short", 1) is None


def test_the_bytes_do_not_depend_on_workers_or_units(tokenizer_path: Path, tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "in", files=6)
    lines = [json.dumps({"text": make_text(number)}, ensure_ascii=number % 2 == 0) for number in range(60)]
    (folder / "z.jsonl").write_text("\n".join(lines), encoding="utf-8")
    written = []
    for number, (workers, unit_bytes) in enumerate([(1, 1 << 20), (1, 3000), (2, 3000), (3, 9000)]):
        out = tmp_path / str(number)
        prepare(
            [folder],
            out,
            tokenizer=tokenizer_path,
            validation_fraction=0.2,
            workers=workers,
            unit_bytes=unit_bytes,
            shard_tokens=4000,
        )
        written.append(contents(out))
    assert "train-00001.bin" in written[0]
    assert all(other == written[0] for other in written[1:])


def test_the_split_belongs_to_the_document_not_to_the_place_or_the_company(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def valid_texts(folder: Path, seed: int = 1) -> set[str]:
        out = tmp_path / f"out{len(names(tmp_path))}"
        report = prepare(
            [folder], out, tokenizer=tokenizer.path, validation_fraction=0.3, seed=seed, workers=1
        )
        assert report.validation is not None
        return set(texts(report.validation.prefix, tokenizer))

    small = valid_texts(write_corpus(tmp_path / "a", files=20))
    large = valid_texts(write_corpus(tmp_path / "b" / "elsewhere", files=30))
    assert small == large & {make_text(number) for number in range(20)}
    assert small != valid_texts(tmp_path / "a", seed=2)


def test_without_validation_only_train_is_written(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    prepare([corpus], tmp_path, tokenizer=tokenizer_path, validation_fraction=0.5, workers=1)
    report = prepare(
        [corpus], tmp_path, tokenizer=tokenizer_path, validation_fraction=0, workers=1, overwrite=True
    )
    assert report.validation is None
    assert names(tmp_path) == TRAIN_NAMES, "validation data of another preparation must not stay"


def test_draws_are_even_and_keyed() -> None:
    draws = [draw_of(f"文件{number}.txt", seed=3) for number in range(2000)]
    assert all(0 <= draw < 1 for draw in draws)
    assert 0.47 < sum(draws) / len(draws) < 0.53
    assert draw_of("a", seed=3) != draw_of("a", seed=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.0}, "--validation-fraction"),
        ({"validation_fraction": -0.1}, "--validation-fraction"),
        ({"workers": 0}, "--workers"),
        ({"documents": "page"}, "documents"),
        ({"tokenizer": "gone.model"}, "gone.model does not exist"),
        ({"inputs": ["gone.txt"]}, "gone.txt does not exist"),
        ({"inputs": ["one.txt"], "validation_fraction": 0.1}, "one document.*--validation-fraction 0"),
        ({"inputs": ["empty.txt"]}, "corpus is empty"),
        ({"inputs": ["blank.jsonl"]}, "corpus is empty"),
        ({"inputs": ["one.txt", "bad.txt"]}, "bad.txt is not UTF-8"),
        (
            {"inputs": ["bad.txt"], "max_damaged": 9},
            r"no document of .* left \(damaged records: 1\).*bad.txt is not UTF",
        ),
        (
            {"inputs": ["one.txt", "bad.txt"], "max_damaged": 9, "validation_fraction": 0.1},
            "only one document of the corpus is left .*bad.txt is not UTF-8",
        ),
        ({"inputs": ["one.txt", "bad.txt"], "workers": 2}, "bad.txt is not UTF-8"),
        ({"output": "one.txt"}, "is a file"),
    ],
)
def test_a_refused_preparation_writes_nothing(
    tokenizer_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    # Two workers need two stretches.
    Path("one.txt").write_text("一个文档\n" * 200_000, encoding="utf-8")
    Path("bad.txt").write_bytes(b"good\xff")
    Path("empty.txt").write_bytes(b"")
    Path("blank.jsonl").write_text('{"text": ""}\n\n', encoding="utf-8")
    before = names(tmp_path)
    given: dict[str, Any] = {
        "inputs": ["one.txt"],
        "output": "new/out",
        "tokenizer": tokenizer_path,
        "validation_fraction": 0.0,
        "workers": 1,
        **options,
    }
    with pytest.raises(UserError, match=message):
        prepare(given.pop("inputs"), given.pop("output"), **given)
    assert not list(tmp_path.rglob("*.bin"))
    assert [name for name in names(tmp_path) if name != "new"] == before
    # Only what saves work next time is kept.
    assert not Path("new/out").exists() or next(Path("new/out/.preparing/units").rglob("*/*"))


def test_a_begin_token_stands_before_each_document_where_it_is_asked_for(
    corpus: Path, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(tokenizer_path, tmp_path / "tokenizer.model")
    bare, side = tmp_path / "tokenizer.model", tmp_path / "tokenizer_config.json"
    command = ["prepare", str(corpus), "--tokenizer", str(bare), "--workers", "1", "--overwrite"]
    for says, options, begin, told in (
        (None, [], None, "ends with </s> (2); none begins with <s> (--begin-token always puts it there)"),
        (None, ["--begin-token", "always"], 1, "begins with <s> (1) and ends with </s> (2)"),
        (True, [], 1, "begins with <s> (1) and ends with </s> (2)"),
        (True, ["--begin-token", "never"], None, "none begins with <s>"),
    ):
        side.write_text(json.dumps({"add_bos_token": says}), encoding="utf-8")
        assert main([*command, *options, "--output", str(tmp_path / "out")]) == 0
        assert told in capsys.readouterr().out
        manifest, opened = read_manifest(tmp_path / "out/train"), TokenFile(tmp_path / "out/train")
        assert manifest is not None and manifest.begin_id == begin
        report = json.loads((tmp_path / "out/prepared.json").read_text(encoding="utf-8"))
        assert (report["tokenizer"]["begin_id"], report["tokenizer"]["eod_id"]) == (begin, 2)
        for document, length in enumerate(opened.document_lengths):
            ids = opened.read(document, start=0, count=int(length)).tolist()
            assert (ids[0] == 1) is (begin is not None) and 1 not in ids[1:] and ids[-1] == 2


def test_what_was_tokenized_with_other_tokens_round_a_document_is_not_taken(
    corpus: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    files = expand_inputs([corpus])
    loaded = load_tokenizer(tokenizer_path)
    keys = set()
    for begin_id, eod_id in ((None, 2), (1, 2), (None, 1)):
        loaded.eod_id = eod_id  # as a file beside a tokenizer.json may name another one later
        units = plan_units(files, reading=Reading(), seed=1, tokenizer=loaded, begin_id=begin_id)
        keys.add(tuple(unit.key for unit in units))
    assert len(keys) == 3


class Panic(BaseException):
    """As pyo3 raises it: no Exception, so that programs end."""


Panic.__name__ = "PanicException"


@pytest.mark.parametrize("error", [Panic("called `Result::unwrap()`"), RuntimeError("full")], ids=repr)
def test_a_tokenizer_that_fails_names_the_document(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "一"}\n{"text": "poison"}\n{"text": "二"}\n', encoding="utf-8")
    (tmp_path / "b.txt").write_text("poison", encoding="utf-8")
    encode = type(tokenizer).encode

    def fail(self: Tokenizer, text: str) -> list[int]:
        if "poison" in text:
            raise error
        return encode(self, text)

    monkeypatch.setattr(type(tokenizer), "encode", fail)
    monkeypatch.setattr(type(tokenizer), "encode_batch", lambda self, texts: [fail(self, t) for t in texts])
    for name, place in (("a.jsonl", r" \(the one at byte 16\)"), ("b.txt", "")):
        message = (
            rf"file .*{name} has a document{place} that the tokenizer .*tokenizer.model cannot encode \("
        )
        with pytest.raises(UserError, match=message):
            prepare([tmp_path / name], tmp_path / "out", tokenizer=tokenizer.path, workers=1)
    assert not (tmp_path / "out").exists()


def test_existing_data_is_kept_unless_told_otherwise(
    corpus: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    prepare([corpus], tmp_path, tokenizer=tokenizer_path, workers=1)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"holds prepared data already \(train.bin.*overwrite"):
        prepare([corpus], tmp_path, tokenizer=tokenizer_path, workers=1)
    assert contents(tmp_path) == before
    prepare([corpus], tmp_path, tokenizer=tokenizer_path, workers=1, overwrite=True, validation_fraction=0.5)
    assert names(tmp_path) == ALL_NAMES and contents(tmp_path) != before
    assert checksum_problems(tmp_path / "train") == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["add", "finish"])
def test_a_full_disk_keeps_what_was_there(
    corpus: Path,
    tokenizer_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    call: str,
) -> None:
    prepare([corpus], tmp_path, tokenizer=tokenizer_path, workers=1)
    before = contents(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(TokenWriter, call, fail)
    message = "cannot be written" if number == errno.EIO else "no space left"
    with pytest.raises(UserError, match=message):
        prepare([corpus], tmp_path, tokenizer=tokenizer_path, workers=1, overwrite=True, seed=5)
    assert contents(tmp_path) == before
    monkeypatch.undo()
    report = prepare([corpus], tmp_path, tokenizer=tokenizer_path, workers=1, overwrite=True, seed=5)
    assert report.resumed_bytes == report.source_bytes, "what was tokenized before the disk was full is kept"


RUN = """
import resource, sys
from megallama.prepare.run import prepare
from megallama.cli import main
from megallama.corpus.corpus import Reading, expand_inputs
from megallama.host.errors import UserError
inputs, output, tokenizer, limit, workers = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    prepare([inputs], output, tokenizer=tokenizer, workers=int(workers), overwrite=True,
            progress=lambda done, total: print(done, flush=True))
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


def start(inputs: Path, output: Path, tokenizer: Path, *, limit: int = 0, workers: int = 1) -> Any:
    arguments = [str(item) for item in (inputs, output, tokenizer, limit, workers)]
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", RUN, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_real_write_failure_gives_one_message_and_leaves_nothing(
    corpus: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    process = start(corpus, tmp_path / "out", tokenizer_path, limit=4000)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(messages.strip().splitlines()) == 1 and "cannot be written" in messages
    assert not (tmp_path / "out").exists()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_preparation_leaves_the_old_data_and_no_process(
    tokenizer_path: Path, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepare([corpus], out, tokenizer=tokenizer_path, workers=1)
    before = contents(out)
    large = tmp_path / "large.jsonl"
    line = json.dumps({"text": make_text(1)}) + "\n"
    large.write_text(line * (8_000_000 // len(line)), encoding="utf-8")
    process = start(large, out, tokenizer_path, workers=2)
    assert process.stdout.readline(), process.stderr.read()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    with pytest.raises(UserError, match="being written by another"):
        prepare([corpus], out, tokenizer=tokenizer_path, workers=1, overwrite=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(is_running(int(child)) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(int(child)) for child in children)
    process.stdout.close()
    process.stderr.close()
    assert names(out) == sorted([".preparing", *before]) and contents(out) == before
    prepare([corpus], out, tokenizer=tokenizer_path, workers=1, overwrite=True)
    assert contents(out) == before, "the same preparation again"
    assert names(out) == sorted(before), "and the leftovers of the killed one gone"


def test_a_dead_worker_is_an_error_not_a_hang(tokenizer_path: Path, tmp_path: Path) -> None:
    def kill_all(done: int, total: int) -> None:
        # One of them alone may have nothing more to do.
        for child in multiprocessing.active_children():
            child.kill()

    large = tmp_path / "large.jsonl"
    line = json.dumps({"text": make_text(1)}) + "\n"
    large.write_text(line * (12_000_000 // len(line)), encoding="utf-8")
    with pytest.raises(UserError, match="process died .2 workers"):
        prepare([large], tmp_path / "out", tokenizer=tokenizer_path, workers=2, progress=kill_all)
    assert names(tmp_path / "out") == [".preparing"]
