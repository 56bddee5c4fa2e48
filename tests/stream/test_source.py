"""Sources over several files, parts of them held out, and indexes that are damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megallama.host.errors import UserError
from megallama.prepare.run import prepare
from megallama.stream.source import JoinedSource, Place, cut_for_validation
from megallama.tokens.token_file import TokenFile, write_token_file


def files_of(folder: Path, shards: list[list[int]]) -> list[TokenFile]:
    """Files with documents of the given lengths; tokens are numbered through all of them."""
    files, token = [], 0
    for number, lengths in enumerate(shards):
        documents = []
        for length in lengths:
            documents.append(list(range(token, token + length)))
            token += length
        write_token_file(folder / f"片{number}", documents)
        files.append(TokenFile(folder / f"片{number}"))
    return files


shards = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(lengths=shards, data=st.data())
def test_any_part_of_joined_files_is_what_they_hold(
    lengths: list[list[int]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = files_of(tmp_path_factory.mktemp("files"), lengths)
    total = sum(map(sum, lengths))
    first = data.draw(st.integers(0, total - 1))
    end = data.draw(st.integers(first + 1, total))
    source = JoinedSource("源", files, first=first, end=end)
    assert (source.num_tokens, source.span) == (end - first, (first, end))
    start = data.draw(st.integers(0, source.num_tokens))
    count = data.draw(st.integers(0, source.num_tokens - start))
    views = list(source.views(start, count))
    assert [t for view in views for t in view.tolist()] == list(range(first + start, first + start + count))
    assert not any(view.flags.owndata or view.flags.writeable for view in views), "views of the mapped file"
    places = [
        (token, Place(files[shard].name, document, offset))
        for token, (shard, document, offset) in enumerate(
            (shard, document, offset)
            for shard, own in enumerate(lengths)
            for document, length in enumerate(own)
            for offset in range(length)
        )
    ]
    begins = [token - first for token, place in places if place.offset == 0 and first <= token < end]
    assert source.document_starts(start, count) == [b for b in begins if start <= b < start + count]
    parts = [start for part in source.document_starts_in_parts() for start in part.tolist()]
    assert sorted(set(parts)) == begins
    for token, place in places[first:end]:
        assert source.place(token - first) == place


def test_a_long_file_is_searched_and_read_in_parts(tmp_path: Path) -> None:
    (file,) = files_of(tmp_path, [[1, 2] * 1000])
    source = JoinedSource("a", [file])
    assert source.document_starts(1500, 1500) == [t for t in range(1500, 3000) if t % 3 != 2]
    assert source.place(2999) == Place(file.name, 1999, 1)


def test_documents_of_several_sequences_are_one(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(f"{tmp_path}/m.bin", dtype=np.uint16)
    builder.add_document(np.arange(7, dtype=np.uint16), [3, 4])
    builder.add_document(np.arange(5, dtype=np.uint16), [5])
    builder.finalize(f"{tmp_path}/m.idx")
    file = TokenFile(tmp_path / "m")
    assert file.document_lengths.tolist() == [7, 5] and file.document_at(6) == 0 and file.document_at(7) == 1
    assert JoinedSource("m", [file]).document_starts(0, 12) == [0, 7]


def test_identity_is_the_content_wherever_it_lies(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        prepare([corpus], tmp_path / str(seed), tokenizer=tokenizer_path, workers=1, seed=seed)
    shutil.copytree(tmp_path / "1", tmp_path / "别处")
    first, other, copy = (TokenFile(tmp_path / name / "train").identity for name in ("1", "2", "别处"))
    assert first == copy != other
    # Files of Megatron's have no manifest.
    for name in ("1", "2", "别处"):
        (tmp_path / name / "train.json").unlink()
    sampled, others, copied = (TokenFile(tmp_path / name / "train").identity for name in ("1", "2", "别处"))
    assert sampled == copied and len({first, sampled, others}) == 3
    files = files_of(tmp_path, [[3], [4]])
    identities = [JoinedSource("", files).identity, JoinedSource("", files[::-1]).identity]
    identities += [JoinedSource("", files, end=5).identity, JoinedSource("", files, first=5).identity]
    assert len(set(identities)) == 4


@pytest.mark.parametrize(("fraction", "kept"), [(0.1, 16), (0.3, 12), (0.5, 7), (1e-9, 16)])
def test_whole_documents_at_the_end_are_held_out(tmp_path: Path, fraction: float, kept: int) -> None:
    files = files_of(tmp_path, [[3, 4], [5, 4, 4]])
    train, validation = cut_for_validation(JoinedSource("a", files), files, fraction)
    assert (train.span, validation.span) == ((0, kept), (kept, 20))
    with pytest.raises(UserError, match=r"validation_fraction \(0.9\) of data source a leaves no document"):
        cut_for_validation(JoinedSource("a", files), files, 0.9)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        # 34 bytes of header, 4 lengths of 4 bytes, 4 pointers of 8, 5 first sequences of 8.
        (50 + 8, -8, r"offset 58: document 1 at byte -8 of 48"),
        (50 + 8, 7, r"offset 58: document 1 at byte 7 of 48"),
        (50 + 8, 1 << 40, r"offset 58: document 1 at byte 1099511627776 of 48"),
        (50 + 16, 4, r"offset 66: document 2 at byte 4 of 48"),
        (82 + 16, 99, r"offset 98: sequence 99 of 4"),
        (82 + 16, -1, r"offset 98: sequence -1 of 4"),
    ],
)
def test_damage_is_named_by_file_and_offset(tmp_path: Path, offset: int, value: int, message: str) -> None:
    files_of(tmp_path, [[3, 3, 3, 3]])
    with open(tmp_path / "片0.idx", "r+b") as stream:
        stream.seek(offset)
        stream.write(value.to_bytes(8, "little", signed=True))
    source = JoinedSource("a", [TokenFile(tmp_path / "片0")])
    with pytest.raises(UserError, match=rf"index .*片0.idx is damaged \({message}\): prepare or copy"):
        source.document_starts(0, 12)
