"""Cheap checks of token files, and opening them."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megallama.host.errors import ConfigError, UserError
from megallama.prepare.run import prepare
from megallama.tokens.manifest import check_token_file, read_manifest
from megallama.tokens.token_file import TokenFile
from tests.support.checksums import checksum_problems


@pytest.fixture
def prefix(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> Path:
    report = prepare([corpus], tmp_path / "数据", tokenizer=tokenizer_path, validation_fraction=0, workers=1)
    return report.train.prefix


def change(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def shorten(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def change_manifest(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def test_a_sound_file_has_no_problems(prefix: Path) -> None:
    assert check_token_file(prefix) == checksum_problems(str(prefix)) == []
    manifest = read_manifest(prefix)
    assert manifest is not None and manifest.documents == 40
    # Data of before a manifest named the begin token has none of its own.
    path = Path(f"{prefix}.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["begin_id"]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert read_manifest(prefix) == manifest and manifest.begin_id is None and check_token_file(prefix) == []
    change_manifest(path, begin_id="<s>")
    assert "invalid value for, begin_id" in check_token_file(prefix)[0]


IDX, BIN, JSON = ".idx", ".bin", ".json"


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (BIN, Path.unlink, "does not exist .no .bin"),
        (IDX, Path.unlink, "does not exist .no .idx"),
        (IDX, lambda p: p.write_bytes(b""), r"damaged \(only 0 bytes"),
        (IDX, lambda p: change(p, 0, b"XX"), "does not begin as an index"),
        (IDX, lambda p: change(p, 9, b"\x02"), "does not begin as an index"),
        (IDX, lambda p: change(p, 17, b"\x06"), "number format 6"),
        (IDX, lambda p: change(p, 17, b"\x63"), "number format 99"),
        (IDX, lambda p: change(p, 18, b"\xff" * 8), "where its header asks for"),
        (IDX, lambda p: shorten(p, 8), "where its header asks for"),
        (IDX, lambda p: change(p, p.stat().st_size - 8, b"\x07"), "ends at sequence 7 of 40"),
        (BIN, lambda p: shorten(p, 2), "is truncated"),
        (BIN, lambda p: p.write_bytes(b""), "is truncated"),
        (
            BIN,
            lambda p: p.write_bytes(p.read_bytes() + b"\0\0"),
            "disagrees with its manifest .bytes of .bin",
        ),
        (JSON, lambda p: p.write_bytes(b"{"), "cannot be read"),
        (JSON, lambda p: p.write_bytes(b"\xff"), "cannot be read"),
        (JSON, lambda p: p.write_bytes(b"[]"), "no manifest of a token file"),
        (JSON, lambda p: change_manifest(p, version=2), "version 2"),
        (JSON, lambda p: change_manifest(p, tokens=5), "tokens: [0-9]+, not 5"),
        (JSON, lambda p: change_manifest(p, documents=41), "documents: 40, not 41"),
        (JSON, lambda p: change_manifest(p, eod_id="2"), "has an invalid value for, eod_id"),
    ],
)
def test_each_damage_is_named(
    prefix: Path, suffix: str, damage: Callable[[Path], object], message: str
) -> None:
    damage(Path(f"{prefix}{suffix}"))
    with pytest.raises(ConfigError, match=message) as caught:
        TokenFile(prefix)
    assert str(prefix) in str(caught.value)


def test_checksums_find_a_changed_byte(prefix: Path) -> None:
    change(Path(f"{prefix}.bin"), 100, b"\xff")
    assert check_token_file(prefix) == []
    assert f"{prefix}.bin is not what was prepared (sha256 " in checksum_problems(prefix)[0]


def test_a_path_with_the_suffix_is_explained(prefix: Path) -> None:
    assert "without .bin" in check_token_file(f"{prefix}.bin")[0]


def build(prefix: Path, documents: list[list[list[int]]], *, dtype: type[np.number] = np.int32) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.array(sum(document, []), dtype=dtype), [len(part) for part in document])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize("documents", [[], [[[]]]])
def test_empty_files_are_refused(tmp_path: Path, documents: list[list[list[int]]]) -> None:
    assert "is empty" in check_token_file(build(tmp_path / "x", documents))[0]


def test_files_of_megatron_open_without_a_manifest(tmp_path: Path) -> None:
    sentences: list[list[list[int]]] = [[[1, 2, 3], [4]], [[]], [[5], [6, 70000]]]
    opened = TokenFile(build(tmp_path / "x", sentences))
    assert opened.manifest is None
    assert opened.document_lengths.tolist() == [4, 0, 3]
    assert (opened.num_documents, opened.num_tokens) == (3, 7)
    assert opened.read(0, start=2, count=2).tolist() == [3, 4]
    assert opened.read(2, start=0, count=3).tolist() == [5, 6, 70000]
    assert opened.read(2, start=0, count=3).dtype == np.int64


def test_multimodal_index_length_is_accepted(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(f"{tmp_path}/x.bin", multimodal=True)
    builder.add_document(np.arange(3, dtype=np.int32), [3], [1])
    builder.finalize(f"{tmp_path}/x.idx")
    assert check_token_file(tmp_path / "x") == []


def test_read_manifest_says_what_is_wrong(tmp_path: Path) -> None:
    assert read_manifest(tmp_path / "none") is None
    (tmp_path / "x.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="no manifest"):
        read_manifest(tmp_path / "x")


def test_the_header_is_the_one_megatron_writes(tmp_path: Path) -> None:
    content = Path(f"{build(tmp_path / 'x', [[[1]]])}.idx").read_bytes()
    assert struct.unpack("<9sQBQQ", content[:34]) == (b"MMIDIDX\0\0", 1, 4, 1, 2)


@pytest.mark.parametrize(
    "module",
    ["tokens.manifest", "corpus.corpus", "prepare.encoding", "tokenizers.load", "tokenizers.training"],
)
def test_login_node_and_workers_load_no_torch(module: str) -> None:
    program = f"import sys, megallama.{module}; assert not {{'torch', 'megatron'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
