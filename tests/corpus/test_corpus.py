"""Which files and documents a corpus has, and what is said about bad ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.corpus.corpus import (
    Document,
    Reading,
    cut_stretches,
    expand_inputs,
    read_documents,
    stream_documents,
)
from megallama.corpus.encoding import likely_encoding
from megallama.host.errors import UserError

FILE, BLANK = Reading(documents="file"), Reading(documents="blank_line")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "b.txt",
        "a.txt",
        "sub/c.TXT",
        "sub/d.jsonl",
        "sub/e.py",
        "readme.md",
        ".hidden/x.txt",
        ".y.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"text": "x"}', encoding="utf-8")
    os.symlink(tmp_path / "a.txt", tmp_path / "sub" / "link.txt")
    return tmp_path


def relative(files: object) -> list[str]:
    return [file.relative for file in files]  # type: ignore[attr-defined]


def test_folders_globs_and_files(tree: Path) -> None:
    assert relative(expand_inputs([tree])) == ["a.txt", "b.txt", "sub/c.TXT", "sub/d.jsonl"]
    assert relative(expand_inputs([tree], suffixes=["py", ".md"])) == [
        "a.txt",
        "b.txt",
        "readme.md",
        "sub/c.TXT",
        "sub/d.jsonl",
        "sub/e.py",
    ]
    assert relative(expand_inputs([f"{tree}/*.txt"])) == ["a.txt", "b.txt"]
    assert relative(expand_inputs([f"{tree}/**/*.jsonl"])) == ["sub/d.jsonl"]
    assert relative(expand_inputs([f"{tree}/s*"])) == ["sub/c.TXT", "sub/d.jsonl", "sub/link.txt"]


def test_each_file_once_in_the_order_of_the_inputs(tree: Path) -> None:
    assert relative(expand_inputs([tree / "b.txt", tree, tree / "sub" / ".." / "a.txt"])) == [
        "b.txt",
        "a.txt",
        "sub/c.TXT",
        "sub/d.jsonl",
    ]


def test_inputs_that_cannot_be_used(tree: Path) -> None:
    (tree / "nothing").mkdir()
    os.mkfifo(tree / "pipe.txt")
    for item, message in (
        (tree / "gone.txt", "gone.txt does not exist"),
        (f"{tree}/*.gone", "matches no file"),
        (tree / "nothing", "matches no file"),
        (tree / "readme.md", "suffix '.md'"),
        (tree / "pipe.txt", "not a regular file"),
    ):
        with pytest.raises(UserError, match=message):
            expand_inputs([item])
    with pytest.raises(UserError, match="no input"):
        expand_inputs([])
    with pytest.raises(UserError, match="documents .'page'. is unknown"):
        Reading(documents="page")  # type: ignore[arg-type]


def documents_of(path: Path, reading: Reading, *, stretch_bytes: int = 1 << 20) -> list[Document]:
    stretches = cut_stretches(expand_inputs([path]), reading=reading, stretch_bytes=stretch_bytes)
    return [document for stretch in stretches for document in read_documents(stretch, reading=reading)]


def test_a_text_file_is_one_exact_document(tmp_path: Path) -> None:
    text = "  第一行\r\n\r\n\n\tsecond  \n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "b.txt").write_bytes(b"")
    assert list(stream_documents(expand_inputs([tmp_path]), reading=FILE)) == [
        Document(text=text, key="a.txt")
    ]


def test_blank_lines_part_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\n一\n二\r\n \t\r\n\n  three\n\n\nfour".encode())
    assert documents_of(path, BLANK) == [
        Document(text="一\n二\r\n", key="a.txt:1", place=1),
        Document(text="  three\n", key="a.txt:15", place=15),
        Document(text="four", key="a.txt:25", place=25),
    ]
    # Chinese paragraphs are set apart by a line of U+3000, web pages by one of U+00A0 or U+200B.
    for blank in ("\u3000", "\u3000 \u3000\r", "\u00a0", "\u200b", "\u2003\t"):
        path.write_text(f"\u3000一\n{blank}\n\u3000二 \u3000\n", encoding="utf-8", newline="")
        assert [document.text for document in documents_of(path, BLANK)] == [
            "\u3000一\n",
            "\u3000二 \u3000\n",
        ]


def test_jsonl_takes_one_field_of_each_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first = b'\xef\xbb\xbf{"text": "\\u4e2d\\n", "id": 1}\n'
    path.write_bytes(first + b'\n{"text": ""}\r\n' + '{"text": "文"}'.encode())
    assert documents_of(path, FILE) == [
        Document(text="中\n", key="a.jsonl:3", place=3),
        Document(text="文", key=f"a.jsonl:{len(first) + 15}", place=len(first) + 15),
    ]
    (tmp_path / "b.jsonl").write_text('{"正文": "x"}', encoding="utf-8")
    assert documents_of(tmp_path / "b.jsonl", Reading(text_field="正文"))[0].text == "x"
    # A field of an object inside; a field whose own name has the dot goes first.
    nested = '{"data": {"正文": {"text": "内"}}, "a": {"b": "x"}, "a.b": "y"}'
    (tmp_path / "c.jsonl").write_text(nested, encoding="utf-8")
    for name, text in (("data.正文.text", "内"), ("a.b", "y")):
        assert documents_of(tmp_path / "c.jsonl", Reading(text_field=name))[0].text == text


pieces = st.lists(st.sampled_from(["", "  ", "字", "words here", "长" * 30]), max_size=30)


@settings(max_examples=60, deadline=None)
@given(lines=pieces, stretch_bytes=st.integers(1, 60))
def test_stretches_do_not_change_the_documents(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], stretch_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("stretches")
    for name, content, reading in (
        ("a.txt", "\n".join(lines), BLANK),
        ("b.txt", "\n".join(lines), FILE),
        ("c.jsonl", "\n".join(json.dumps({"text": line}) for line in lines), FILE),
    ):
        path = folder / name
        path.write_text(content, encoding="utf-8")
        assert documents_of(path, reading, stretch_bytes=stretch_bytes) == documents_of(path, reading)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.txt",
            "一二".encode() + b"\xff\xfe",
            r"a\.txt is not UTF-8 \(byte 0xff at offset 6\), but the text around it is: mend that place",
        ),
        (
            "a.txt",
            "中文".encode("gbk"),
            r"at offset 0\), it looks like GB18030: convert it \(iconv -f GB18030 -t UTF-8 FILE > NEW\)",
        ),
        (
            "a.txt",
            b"good\xff",
            r"find out its encoding, convert it \(iconv -f ENCODING -t UTF-8 FILE > NEW\)",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"a\.jsonl is not UTF-8 \(byte 0xff at offset 24\)"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a\.jsonl line 3 is not JSON .*column"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"body": "b", "id": 1}',
            r"line 2 has no text in field 'text' .*body, id",
        ),
        (
            "a.jsonl",
            b'{"text": 5}',
            r"line 1 has no text in field 'text' \(that is a number\): mend the line",
        ),
        ("a.jsonl", b'{"text": null}', r"line 1 has no text in field 'text' \(that is null\)"),
        (
            "a.jsonl",
            b'{"text": {"zh": "x", "n": 1, "{}": {"en": "y"}}}',
            r"\(that is an object with text.zh, text.\{\}.en\): name the field inside it with --text-field",
        ),
        (
            "a.jsonl",
            b'{"id": 1, "data": {"text": "x"}}',
            r"in field 'text' \(it has data.text, id\): mend the line",
        ),
        ("a.jsonl", b'["text"]', r"line 1 has no text in field 'text' \(it has a list"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"line 1 holds half a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, r"line 1 is (nested too deeply|not JSON)"),
    ],
)
@pytest.mark.parametrize("stretch_bytes", [5, 1 << 20])
def test_bad_content_is_named_with_its_place(
    tmp_path: Path, name: str, content: bytes, message: str, stretch_bytes: int
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        documents_of(path, FILE, stretch_bytes=stretch_bytes)


def test_blank_line_documents_name_the_offset_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ntwo\xff\n")
    with pytest.raises(UserError, match="offset 8"):
        documents_of(path, BLANK)


CHINESE = "话说天下大势，分久必合，合久必分。周末七国分争，并入于秦。"


@pytest.mark.parametrize(
    ("text", "encoding", "name"),
    [
        (CHINESE, "gbk", "GB18030"),
        ("训练 a model 模型 with 数据", "gb18030", "GB18030"),
        ("話說天下大勢，分久必合，合久必分。", "big5", "BIG5"),
        (CHINESE, "utf-16", "UTF-16"),
        (CHINESE, "utf-16-le", "UTF-16LE"),
        (CHINESE, "utf-16-be", "UTF-16BE"),
        (CHINESE, "utf-32", "UTF-32"),
        ("吾輩は猫である。名前はまだ無い。", "shift_jis", "SHIFT_JIS"),
        ("吾輩は猫である。名前はまだ無い。", "euc_jp", "EUC-JP"),
        ("모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어", "euc_kr", "EUC-KR"),
        ("Les élèves étaient à l'école, où ça sentait le café", "cp1252", "WINDOWS-1252"),
        (CHINESE + "\ufffd", "utf-8-sig", None),
        ("abc", "ascii", None),
    ],
)
def test_the_encoding_of_other_text_is_named(text: str, encoding: str, name: str | None) -> None:
    content = ((text + "\n") * 3).encode(encoding) + (b"\xff" if name is None else b"")
    with pytest.raises(UnicodeDecodeError) as caught:
        content.decode("utf-8")
    assert likely_encoding(content, caught.value.start) == name
