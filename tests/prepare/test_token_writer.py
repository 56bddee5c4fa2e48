"""Token files: the bytes of megatron-core's own writer, splits that are never empty, shards of a given size."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megallama.prepare import token_writer
from megallama.prepare.encoding import EncodedUnit, token_type
from megallama.prepare.run import prepare
from megallama.prepare.token_writer import TokenWriter, join_units
from megallama.stream.open import open_files
from megallama.tokenizers.interface import Tokenizer
from megallama.tokens.manifest import check_token_file, read_manifest, shard_prefixes
from megallama.tokens.token_file import TokenFile
from tests.support.checksums import checksum_problems

DRAWS = st.integers(0, (1 << 20) - 1).map(lambda number: number / (1 << 20))
"""As `draw_of` gives them: multiples of a power of two, whose distances from a fraction do not round to one."""


def tokenizer_of(vocab_size: int) -> Tokenizer:
    facts = SimpleNamespace(name="t", sha256="0", vocab_size=vocab_size, eod_id=0)
    return cast(Tokenizer, facts)


@pytest.mark.parametrize("vocab_size", [100, 65_499, 65_500, 150_000])
def test_the_bytes_are_those_of_megatron_core(tmp_path: Path, vocab_size: int) -> None:
    dtype = token_type(vocab_size)
    assert dtype is DType.optimal_dtype(vocab_size)
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 40, size=30)
    tokens = generator.integers(0, vocab_size, size=lengths.sum()).astype(dtype)
    with TokenWriter(tmp_path / "ours", tokenizer=tokenizer_of(vocab_size)) as writer:
        origins = np.zeros((30, 2), np.int64)
        writer.add(tokens[: lengths[:7].sum()], lengths[:7], origins[:7])
        writer.add(tokens[lengths[:7].sum() :], lengths[7:], origins[7:])
        writer.finish()
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for part in np.split(tokens, np.cumsum(lengths)[:-1]):
        builder.add_document(part, [part.size])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    assert checksum_problems(tmp_path / "ours") == []


def parts_of(unit: EncodedUnit, documents: int) -> list[EncodedUnit]:
    """The same, so many documents at a time."""
    ends = np.concatenate([[0], np.cumsum(unit.lengths)])
    parts = []
    for first in range(0, unit.lengths.size, documents):
        end = min(first + documents, unit.lengths.size)
        parts.append(
            EncodedUnit(
                tokens=unit.tokens[ends[first] : ends[end]],
                lengths=unit.lengths[first:end],
                draws=unit.draws[first:end],
                stretches=unit.stretches[first:end],
                places=unit.places[first:end],
            )
        )
    return parts


@settings(max_examples=100, deadline=None)
@given(
    draws=st.lists(st.lists(DRAWS, max_size=5), min_size=1, max_size=4),
    fraction=st.floats(0.001, 0.999),
    shard_tokens=st.none() | st.integers(1, 12),
    seed=st.integers(0, 99),
    part_documents=st.integers(1, 5),
)
def test_no_split_is_empty_no_document_lost_and_no_shard_too_long(
    tmp_path_factory: pytest.TempPathFactory,
    draws: list[list[float]],
    fraction: float,
    shard_tokens: int | None,
    seed: int,
    part_documents: int,
) -> None:
    flat = [draw for unit in draws for draw in unit]
    if len(flat) < 2:
        return
    lengths = np.random.default_rng(seed).integers(1, 6, size=len(flat))
    ends = np.cumsum([len(unit) for unit in draws])
    units: dict[Path, EncodedUnit] = {}
    for number, unit in enumerate(draws):
        mine = range(ends[number] - len(unit), ends[number])
        units[Path(str(number))] = EncodedUnit(
            tokens=np.repeat(np.array(mine, dtype=np.uint16), lengths[list(mine)]),
            lengths=lengths[list(mine)].astype(np.int64),
            draws=np.array(unit, dtype=np.float64),
            stretches=np.array([n % 2 for n in mine], dtype=np.int64),
            places=np.array(mine, dtype=np.int64),
        )
    folder = tmp_path_factory.mktemp("splits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            token_writer, "read_unit", lambda path, vocab_size: parts_of(units[path], part_documents)
        )
        patch.setattr(
            token_writer,
            "read_draws",
            lambda path, vocab_size: [part.draws for part in parts_of(units[path], part_documents)],
        )
        manifests, counts = join_units(
            list(units),
            folder,
            files_of=[np.array([2 * number, 2 * number + 1]) for number in range(len(draws))],
            tokenizer=tokenizer_of(100),
            begin_id=7,
            validation_fraction=fraction,
            shard_tokens=shard_tokens,
        )
    assert counts[: len(flat)].tolist() == lengths.tolist()
    found: dict[str, list[int]] = {}
    for name, manifest in manifests.items():
        assert read_manifest(folder / name) == manifest and manifest.begin_id == 7
        assert checksum_problems(folder / name) == []
        files = [TokenFile(prefix) for prefix in shard_prefixes(folder / name)]
        assert (len(files) == manifest.shards) if shard_tokens else (manifest.shards == 0)
        documents = [
            file.read(n, start=0, count=int(c)) for file in files for n, c in enumerate(file.document_lengths)
        ]
        assert all(len(set(document.tolist())) == 1 for document in documents)
        assert [len(document) for document in documents] == [lengths[document[0]] for document in documents]
        found[name] = [int(document[0]) for document in documents]
        assert found[name] == sorted(found[name]), "the order of the corpus"
        recorded = [np.fromfile(f"{file.name}.origins", dtype="<i8").reshape(-1, 2) for file in files]
        assert [tuple(row) for rows in recorded for row in rows.tolist()] == [
            (2 * int(np.searchsorted(ends, n, side="right")) + n % 2, n) for n in found[name]
        ]
        for file in files:
            assert shard_tokens is None or file.num_tokens <= shard_tokens or file.num_documents == 1
    assert found["train"] and found["valid"]
    assert sorted(found["train"] + found["valid"]) == list(range(len(flat)))
    assert max(flat[n] for n in found["valid"]) <= min(flat[n] for n in found["train"])


@pytest.fixture
def sharded(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> Path:
    """A prefix that stands for several shards."""
    report = prepare(
        [corpus],
        tmp_path / "数据",
        tokenizer=tokenizer_path,
        validation_fraction=0,
        shard_tokens=3000,
        workers=1,
    )
    assert report.train.shards > 2
    return report.train.prefix


def test_one_path_stands_for_all_shards(
    sharded: Path, corpus: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    whole = prepare(
        [corpus], tmp_path / "one", tokenizer=tokenizer_path, validation_fraction=0, workers=1
    ).train
    files = open_files(str(sharded))
    expected = TokenFile(whole.prefix)
    parts = [file.view(0, file.num_tokens) for file in files]
    assert np.concatenate(parts).tolist() == expected.view(0, expected.num_tokens).tolist()
    manifest = read_manifest(sharded)
    assert manifest is not None and (manifest.tokens, manifest.documents) == (whole.tokens, whole.documents)
    moved = sharded.parent.rename(tmp_path / "moved") / sharded.name
    assert len(open_files(str(moved))) == manifest.shards and check_token_file(moved) == []
    assert shard_prefixes(whole.prefix) == [str(whole.prefix)]


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-00001.bin", lambda p: p.unlink(), "train-00001 does not exist .no .bin"),
        ("train-00001.bin", lambda p: p.write_bytes(p.read_bytes()[:-2]), "train-00001.bin is truncated"),
        ("train-00001.json", lambda p: p.unlink(), "shard .*train-00001 has no manifest"),
        (
            "train-00001.json",
            lambda p: change_json(p, bin_sha256="x"),
            "shards of .*train disagree with .*train.json",
        ),
        ("train.json", lambda p: change_json(p, shards=2), "2 shards of .*train disagree"),
        ("train.json", lambda p: change_json(p, shards=99), "does not exist"),
        ("train.json", lambda p: p.write_text("{"), "cannot be read"),
    ],
)
def test_each_damage_of_shards_is_named(sharded: Path, name: str, damage: Any, message: str) -> None:
    damage(sharded.parent / name)
    problems = " ".join(check_token_file(sharded))
    assert re.search(message, problems), problems
