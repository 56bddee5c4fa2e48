"""Compressed files, Parquet and separators: any cut gives the same documents, any damage one message with its place."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.corpus import documents as documents_module
from megallama.corpus.corpus import (
    Damage,
    Document,
    Reading,
    cut_stretches,
    expand_inputs,
    read_documents,
    read_records,
)
from megallama.corpus.script import count_scripts
from megallama.corpus.script_counts import count_characters
from megallama.host.errors import UserError

FILE, BLANK = Reading(), Reading(documents="blank_line")
SEPARATOR = Reading(documents="separator", separator="——分隔——")

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    # Several members or frames, as parallel compressors and `cat` write them.
    ".many.gz": lambda content: b"".join(
        gzip.compress(content[i : i + 50]) for i in range(0, len(content), 50)
    ),
    ".many.zst": lambda content: b"".join(
        zstandard.compress(content[i : i + 50]) for i in range(0, len(content), 50)
    ),
    # With the padding that may stand between streams of xz.
    ".many.xz": lambda content: b"".join(
        lzma.compress(content[i : i + 50]) + bytes(8) for i in range(0, len(content), 50)
    ),
    ".many.bz2": lambda content: b"".join(
        bz2.compress(content[i : i + 50]) for i in range(0, len(content), 50)
    ),
}


WHITE = "".join(chr(code) for code in range(sys.maxunicode) if chr(code).isspace()) + "\u200b\ufeff"


def records(path: Path, reading: Reading, *, stretch_bytes: int = 1 << 20) -> list[Document | Damage]:
    stretches = cut_stretches(expand_inputs([path]), reading=reading, stretch_bytes=stretch_bytes)
    return [record for stretch in stretches for record in read_records(stretch, reading=reading)]


def texts(path: Path, reading: Reading = FILE, *, stretch_bytes: int = 1 << 20) -> list[str]:
    stretches = cut_stretches(expand_inputs([path]), reading=reading, stretch_bytes=stretch_bytes)
    return [d.text for stretch in stretches for d in read_documents(stretch, reading=reading)]


def plain_parts(content: str, is_boundary: Callable[[str], bool]) -> list[str]:
    """The definition, on the whole text at once."""
    parts = [""]
    for line in re.findall(r"[^\n]*\n|[^\n]+", content.removeprefix("\ufeff")):
        if is_boundary(line):
            parts.append("")
        else:
            parts[-1] += line
    return [part for part in parts if part]


line = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            "\t",
            "——分隔——",
            "——分隔—— ",
            "语言模型",
            "words here",
            "𠮷野家の" * 9,
            "\u3000",
            "\x85",
            "\u2028",
        ]
    ),
    st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\n\r"), max_size=12),
)
content = st.builds(
    lambda start, lines, ends, last: (
        start + "".join(text + end for text, end in zip(lines, ends, strict=False)) + last
    ),
    st.sampled_from(["", "\ufeff"]),
    st.lists(line, max_size=25),
    st.lists(st.sampled_from(["\n", "\r\n"]), min_size=25, max_size=25),
    line,
)


@settings(max_examples=150, deadline=None)
@given(content=content, stretch_bytes=st.integers(1, 80), kind=st.sampled_from(sorted(COMPRESS)))
def test_any_cut_gives_the_documents_of_the_definition(
    tmp_path_factory: pytest.TempPathFactory, content: str, stretch_bytes: int, kind: str
) -> None:
    folder = tmp_path_factory.mktemp("cuts")
    path = folder / f"文.txt{kind}".replace(".txt.many", ".many.txt")
    path.write_bytes(COMPRESS[kind](content.encode()))
    blank = plain_parts(content, lambda line: not line.strip(WHITE))
    assert texts(path, BLANK, stretch_bytes=stretch_bytes) == blank
    parted = plain_parts(content, lambda line: line.rstrip("\r\n") == "——分隔——")
    assert texts(path, SEPARATOR, stretch_bytes=stretch_bytes) == parted
    whole = content.removeprefix("\ufeff")
    assert texts(path, FILE, stretch_bytes=stretch_bytes) == ([whole] if whole else [])


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.text(st.characters(blacklist_categories=["Cs"]), max_size=20), max_size=20),
    is_ascii=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
    has_last_end=st.booleans(),
    has_mark=st.booleans(),
    stretch_bytes=st.integers(1, 200),
    kind=st.sampled_from(sorted(COMPRESS)),
)
def test_any_cut_of_json_lines_gives_every_text_once(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[str],
    is_ascii: bool,
    end: str,
    has_last_end: bool,
    has_mark: bool,
    stretch_bytes: int,
    kind: str,
) -> None:
    path = tmp_path_factory.mktemp("lines") / f"a.jsonl{kind}".replace(".jsonl.many", ".many.jsonl")
    text = end.join(json.dumps({"text": value}, ensure_ascii=is_ascii) for value in values)
    text = ("\ufeff" if has_mark else "") + text + (end if has_last_end else "")
    path.write_bytes(COMPRESS[kind](text.encode()))
    assert texts(path, stretch_bytes=stretch_bytes) == [value for value in values if value]
    keys = [
        record.key
        for record in records(path, FILE, stretch_bytes=stretch_bytes)
        if isinstance(record, Document)
    ]
    assert len(set(keys)) == len(keys)
    assert keys == [record.key for record in records(path, FILE) if isinstance(record, Document)]


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.binary(),
        pyarrow.large_binary(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.int16(), pyarrow.binary()),
    ],
    ids=str,
)
@pytest.mark.parametrize("stretch_bytes", [300, 1 << 20])
def test_parquet_by_row_groups(tmp_path: Path, kind: pyarrow.DataType, stretch_bytes: int) -> None:
    values = [f"第{number}行\n text" for number in range(700)]
    is_bytes = pyarrow.types.is_dictionary(kind) and pyarrow.types.is_binary(kind.value_type)
    plain = pyarrow.array(values, pyarrow.string())
    column = plain.cast(pyarrow.binary()).dictionary_encode().cast(kind) if is_bytes else plain.cast(kind)
    table = pyarrow.table({"id": range(700), "正文": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=90)
    reading = Reading(text_field="正文")
    assert texts(tmp_path / "a.parquet", reading, stretch_bytes=stretch_bytes) == values
    keys = [r.key for r in records(tmp_path / "a.parquet", reading, stretch_bytes=stretch_bytes)]  # type: ignore[union-attr]
    assert keys == [f"a.parquet:{number}" for number in range(700)]


def test_parquet_by_fields_inside_a_column(tmp_path: Path) -> None:
    rows = [{"text": "一", "n": {"deep": "深"}}, {"text": "二", "n": {"deep": "处"}}]
    table = pyarrow.table({"data": rows, "a.b": ["dotted", "name"], "a": [{"b": "x"}, {"b": "y"}]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name, values in (
        ("data.text", ["一", "二"]),
        ("data.n.deep", ["深", "处"]),
        ("a.b", ["dotted", "name"]),
    ):
        assert texts(tmp_path / "a.parquet", Reading(text_field=name)) == values
    pyarrow.parquet.write_table(pyarrow.table({"data": [rows[0], None]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"row 2 has no text in column 'data.text'"):
        texts(tmp_path / "a.parquet", Reading(text_field="data.text"))


GOOD = b"".join(json.dumps({"text": f"good {n}"}).encode() + b"\n" for n in range(2000))


def parquet_of(path: Path, values: list[str | None], name: str = "text") -> None:
    pyarrow.parquet.write_table(pyarrow.table({name: pyarrow.array(values, pyarrow.string())}), path)


def cut_short(path: Path, content: bytes) -> None:
    path.write_bytes(content[:-9])


def spoil_middle(path: Path, content: bytes) -> None:
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])


def spoiled_parquet(path: Path) -> None:
    parquet_of(path, [os.urandom(20).hex() for _ in range(900)])
    spoil_middle(path, path.read_bytes())


BROKEN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "gzip cut short": (
        "a.jsonl.gz",
        lambda p: cut_short(p, gzip.compress(GOOD)),
        r"a\.jsonl\.gz is damaged \(",
    ),
    "gzip spoiled": (
        "a.jsonl.gz",
        lambda p: spoil_middle(p, gzip.compress(GOOD)),
        r"a\.jsonl\.gz is damaged \(",
    ),
    "no gzip": ("a.txt.gz", lambda p: p.write_bytes(b"plain text"), r"a\.txt\.gz is damaged \(Not a gzipped"),
    "zstd cut short": (
        "a.txt.zst",
        lambda p: cut_short(p, zstandard.compress(GOOD)),
        r"a\.txt\.zst is damaged \(",
    ),
    "zstd between frames": (
        "a.txt.zst",
        lambda p: p.write_bytes(zstandard.compress(GOOD) + zstandard.compress(GOOD)[:3]),
        r"a\.txt\.zst is damaged \(",
    ),
    "zstd spoiled": (
        "a.txt.zst",
        lambda p: spoil_middle(p, zstandard.ZstdCompressor(write_checksum=True).compress(GOOD)),
        r"a\.txt\.zst is damaged \(",
    ),
    "xz cut short": ("a.txt.xz", lambda p: cut_short(p, lzma.compress(GOOD)), r"a\.txt\.xz is damaged \("),
    "xz spoiled in its second stream": (
        "a.txt.xz",
        lambda p: p.write_bytes(lzma.compress(GOOD) + b"spoiled" + lzma.compress(GOOD)[7:]),
        r"a\.txt\.xz is damaged \(",
    ),
    "bz2 cut short": ("a.txt.bz2", lambda p: cut_short(p, bz2.compress(GOOD)), r"a\.txt\.bz2 is damaged \("),
    "bz2 spoiled in its second stream": (
        "a.txt.bz2",
        lambda p: p.write_bytes(bz2.compress(GOOD) + b"spoiled" + bz2.compress(GOOD)[7:]),
        r"a\.txt\.bz2 is damaged \(",
    ),
    "no bz2": ("a.txt.bz2", lambda p: p.write_bytes(b"plain text"), r"a\.txt\.bz2 is damaged \("),
    "no zstd": ("a.txt.zst", lambda p: p.write_bytes(b"plain text"), r"a\.txt\.zst is damaged \("),
    "no parquet": (
        "a.parquet",
        lambda p: p.write_bytes(b"plain text"),
        r"a\.parquet is not a valid Parquet file \(",
    ),
    "parquet spoiled": ("a.parquet", spoiled_parquet, r"a\.parquet is not a valid Parquet file \("),
    "parquet without the column": (
        "a.parquet",
        lambda p: parquet_of(p, ["x"], name="body"),
        r"a\.parquet has no column 'text' of text \(it has body: string\): name the column",
    ),
    "parquet with a column of another type": (
        "a.parquet",
        lambda p: pyarrow.parquet.write_table(pyarrow.table({"text": [["x"]]}), p),
        r"a\.parquet has no text in column 'text' \(list<.*: name the column with --text-field",
    ),
    "parquet with bytes that are no text": (
        "a.parquet",
        lambda p: pyarrow.parquet.write_table(pyarrow.table({"text": [b"x", "中".encode("gbk")]}), p),
        r"a\.parquet row 2 is not UTF-8",
    ),
    "parquet with an empty cell": (
        "a.parquet",
        lambda p: parquet_of(p, ["x", None]),
        r"a\.parquet row 2 has no text in column 'text'",
    ),
    "packed parquet": (
        "a.parquet.gz",
        lambda p: p.write_bytes(b"x"),
        r"a\.parquet\.gz is compressed Parquet",
    ),
    "packed JSON": (
        "a.jsonl.gz",
        lambda p: p.write_bytes(gzip.compress(GOOD + b'{"body": "{}"}\n')),
        r"a\.jsonl\.gz line 2001 has no text in field 'text' \(it has body\)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_each_damage_is_one_message_with_the_file(tmp_path: Path, case: str) -> None:
    name, make, message = BROKEN[case]
    make(tmp_path / name)
    with pytest.raises(UserError, match=message) as caught:
        texts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_damaged_records_are_told_with_their_lines_wherever_the_file_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "\xe4\xb8\xad"}\n\n{"text": "\xff"}\n{"text": 1}\n[\n{"text": "b"}\n{"text": "\\ud800"}'
    )
    for stretch_bytes in (1, 20, 1 << 20):
        found = records(path, FILE, stretch_bytes=stretch_bytes)
        assert [record.text for record in found if isinstance(record, Document)] == ["中", "b"]
        damaged = [record for record in found if isinstance(record, Damage)]
        assert [(damage.file, damage.line) for damage in damaged] == [(str(path), n) for n in (3, 4, 5, 7)]
    text = tmp_path / "b.txt"
    text.write_bytes("一\n\n二\n坏".encode() + b"\xff\n\nc\n")
    for stretch_bytes in (1, 1 << 20):
        found = records(text, BLANK, stretch_bytes=stretch_bytes)
        assert [r.line if isinstance(r, Damage) else r.text for r in found] == ["一\n", 4, "c\n"]


@pytest.mark.parametrize("change", ["grown", "rewritten", "removed", "cut"])
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    stretches = list(cut_stretches(expand_inputs([path]), reading=FILE, stretch_bytes=20_000))
    reader = read_documents(stretches[0], reading=FILE)
    next(reader)
    if change == "grown":
        path.write_bytes(GOOD + GOOD)
    elif change == "rewritten":
        os.utime(path, ns=(1, 1))
    elif change == "removed":
        path.unlink()
    else:
        path.write_bytes(GOOD[:9000])
    with pytest.raises(
        UserError, match=r"(changed|disappeared) while it was read .*run the same command again"
    ):
        list(reader)


def test_a_document_that_would_not_fit_into_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents_module, "MAX_DOCUMENT_BYTES", 1000)
    for name, reading in (("a.txt", FILE), ("b.txt", BLANK), ("c.jsonl", FILE)):
        path = tmp_path / name
        path.write_bytes(
            "字字字\n".encode() * 200 if name != "c.jsonl" else b'{"text": "' + b"x" * 2000 + b'"}'
        )
        with pytest.raises(UserError, match="a document of more than"):
            texts(path, reading)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"documents": "separator"}, "go together"),
        ({"separator": "x"}, "go together"),
        ({"documents": "separator", "separator": "a\nb"}, "must be one line"),
    ],
)
def test_separators_that_cannot_be(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Reading(**options)  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(blacklist_categories=["Cs", "Cn"])))
def test_characters_are_counted_as_one_by_one(text: str) -> None:
    assert count_characters(text) == dict(count_scripts(text))
    assert count_characters("中文𠮷 abcカ한Ж1") == {
        "han": 3,
        "none": 2,
        "latin": 3,
        "kana": 1,
        "hangul": 1,
        "cyrillic": 1,
    }


def test_the_end_of_a_line_is_no_boundary_wherever_the_file_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("一\nx——分隔——\n二  \n——分隔——\n三\n\n四", encoding="utf-8")
    for stretch_bytes in range(1, 80):
        parted = ["一\nx——分隔——\n二  \n", "三\n\n四"]
        assert texts(path, SEPARATOR, stretch_bytes=stretch_bytes) == parted
        blank = ["一\nx——分隔——\n二  \n——分隔——\n三\n", "四"]
        assert texts(path, BLANK, stretch_bytes=stretch_bytes) == blank


@pytest.mark.parametrize("kind", ["", ".gz"])
def test_files_with_cr_alone_have_lines(tmp_path: Path, kind: str) -> None:
    parts = ["一\r二\r", "  three\r", "four"]
    path = tmp_path / f"a.txt{kind}"
    path.write_bytes(COMPRESS[kind]("\r".join(["\r", parts[0], "\u3000\r", *parts[1:]]).encode()))
    lines = tmp_path / f"b.jsonl{kind}"
    lines.write_bytes(COMPRESS[kind](b'{"text": "a\\nb"}\r\r{"text": "b"}\r[\r{"text": 1}'))
    for stretch_bytes in (1, 7, 1 << 20):
        assert texts(path, BLANK, stretch_bytes=stretch_bytes) == parts
        found = records(lines, FILE, stretch_bytes=stretch_bytes)
        assert [r.line if isinstance(r, Damage) else r.text for r in found] == ["a\nb", "b", 4, 5]
    assert texts(path, FILE) == ["\r".join(["\r", parts[0], "\u3000\r", *parts[1:]])]
    # A CR means nothing where there is LF, be it far behind.
    path.write_bytes(COMPRESS[kind](b"one\r\r" + b"x" * 70_000 + b"\n\ntwo"))
    assert [len(text) for text in texts(path, BLANK)] == [70_006, 3]
    # A CR where what is looked at ends may have its LF behind it.
    path.write_bytes(COMPRESS[kind](b"x" * 65_535 + b"\r\n\r\ntwo"))
    assert [len(text) for text in texts(path, BLANK)] == [65_537, 3]
    # Where lines end with LF, a CR among them is text.
    path.write_bytes(COMPRESS[kind](b"one\r\rstill one\n\ntwo"))
    assert texts(path, BLANK) == ["one\r\rstill one\n", "two"]
