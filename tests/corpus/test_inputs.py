"""Which files inputs mean: links, endings, `.json` with and without lines, and what is passed over is counted."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from megallama.cli import main
from megallama.corpus.corpus import Reading, expand_inputs, stream_documents
from megallama.host.errors import UserError
from tests.support.corpus import make_text


def listed(
    *inputs: Path | str, text_field: str = "text", **options: object
) -> tuple[list[str], Counter[str]]:
    passed: Counter[str] = Counter()
    files = expand_inputs(list(inputs), text_field=text_field, passed_over=passed, **options)  # type: ignore[arg-type]
    return [file.relative for file in files], passed


def write(path: Path, content: str = '{"text": "x"}') -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "corpus/z/a.txt")
    write(tmp_path / "elsewhere/卷/b.txt")
    write(tmp_path / "elsewhere/c.txt")
    os.symlink(tmp_path / "elsewhere", tmp_path / "corpus/链接")
    os.symlink("z", tmp_path / "corpus/a-link-to-z")
    os.symlink(tmp_path / "corpus", tmp_path / "elsewhere/卷/back")
    os.symlink("loop", tmp_path / "corpus/loop")
    names, passed = listed(tmp_path / "corpus")
    # A file that has a path of its own goes by it, whatever links lead there: the split hashes the path.
    assert names == ["z/a.txt", "链接/c.txt", "链接/卷/b.txt"]
    assert passed == {"links to folders given or linked more than once": 2, "without an ending": 1}
    assert listed(tmp_path / "corpus/链接", tmp_path / "elsewhere")[1]["given or linked more than once"] > 0


def test_what_is_not_read_is_counted_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.txt", "b.pdf", "c.PDF", "README", ".git/config", ".DS_Store", "d.tar.gz"):
        write(tmp_path / "in" / name, make_text(len(name)))
    write(tmp_path / "in/settings.json", json.dumps({"name": "corpus"}, indent=2))
    os.symlink("a.txt", tmp_path / "in/b.txt")
    names, passed = listed(tmp_path / "in")
    assert names == ["a.txt"]
    assert passed == {
        "ending .pdf": 2,
        "ending .gz": 1,
        "without an ending": 1,
        "names that begin with a dot": 2,
        ".json without JSON lines that have 'text'": 1,
        "given or linked more than once": 1,
    }
    # A glob that meets a file several times, by itself and in each folder above it, counts it once.
    for name in ("below/e.txt", "below/deep/f.txt", "below/deep/g.pdf", "below/deep/.hidden"):
        write(tmp_path / "in" / name, make_text(len(name)))
    os.symlink("..", tmp_path / "in/below/loop")
    names, passed = listed(tmp_path / "in")
    assert len(names) == 3 and (names, passed) == listed(f"{tmp_path}/in/**")
    assert (passed["ending .pdf"], passed["given or linked more than once"]) == (3, 1)
    assert listed(f"{tmp_path}/in/below/**/*.txt")[0] == [
        "deep/f.txt",
        "e.txt",
        "loop/a.txt",
    ]  # not along the loop
    assert listed(*[tmp_path / "in/a.txt"] * 3) == (["a.txt"], {"given or linked more than once": 1})
    shutil.rmtree(tmp_path / "in/below")
    (tmp_path / "in/a.txt").unlink()
    (tmp_path / "in/b.txt").unlink()
    with pytest.raises(UserError, match=r"matches no file with suffix .* \(.*2 ending .pdf.*\): change it"):
        expand_inputs([tmp_path / "in"])


def test_the_commands_say_what_they_did_not_read(
    tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        write(tmp_path / f"in/{number}.txt", make_text(number) + "\u2581" * (number == 1))
    write(tmp_path / "in/c.pdf")
    prepare = ["prepare", str(tmp_path / "in"), "--tokenizer", str(tokenizer_path), "--workers", "1"]
    assert main([*prepare, "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "not read: 1 (1 ending .pdf)" in shown
    assert "1 documents hold U+2581, which this tokenizer takes for a space" in shown
    report = json.loads((tmp_path / "out/prepared.json").read_text(encoding="utf-8"))
    assert report["files_passed_over"] == {"ending .pdf": 1}
    assert [source["documents_with_u2581"] for source in report["sources"]] == [1]
    train = ["tokenizer", "train", str(tmp_path / "in"), "--vocab-size", "330"]
    assert main([*train, "--output", str(tmp_path / "words")]) == 0
    assert "(not read: 1 ending .pdf)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "is_read"),
    [
        ('{"text": "一"}\n{"text": "二"}\n', True),
        ('\ufeff\n{"text": "一"}', True),
        ('{"text": "一"}', True),
        ('{"text": "broken\n{"text": "二"}\n', True),  # told as damage, not passed over
        ("", True),
        ('{"name": "settings"}', False),
        ('{"name": "settings"}\n{"name": "others"}\n', False),
        ('{"text": null}\n{"text": "二"}\n', True),
        # Vocabularies and documents of more than what is looked at.
        ('{"!": 0, "text": 1, ' + ", ".join(f'"{n}": {n}' for n in range(100_000)) + "}", False),
        ('{"id": "\\"text\\": \\"", "te\\u0078t" : "' + '\\"一' * 300_000 + '"}', True),
        ('{"id": "' + '\\"' * 600_000 + '", "text": "too far"}', False),
        ('{\n  "text": "pretty"\n}', False),
        ('[{"text": "一"}]', False),
        ("[\n" + '{"text": "一"}' + "\n]", False),
    ],
)
def test_json_is_read_where_it_has_lines(tmp_path: Path, content: str, is_read: bool) -> None:
    write(tmp_path / "a.json", content)
    write(tmp_path / "b.txt")
    names, passed = listed(tmp_path)
    assert names == (["a.json", "b.txt"] if is_read else ["b.txt"])
    assert passed == ({} if is_read else {".json without JSON lines that have 'text'": 1})
    # A file that is named itself is never passed over; an ending that is named is one of texts, as ever.
    assert listed(tmp_path / "a.json")[0] == ["a.json"]
    (named,) = expand_inputs([tmp_path / "a.json"], suffixes=[".json"])
    assert not named.is_jsonl


def test_a_list_says_how_to_make_lines_of_it(tmp_path: Path) -> None:
    for content, message in (
        (
            '[{"text": "一"}]',
            r"it has a list\): put one JSON object on each line \(jq -c '.\[\]' FILE > NEW\)",
        ),
        ('[\n{"text": "一"}\n]', r"line 1 is not JSON .* on each line \(jq -c '.\[\]' FILE > NEW\)"),
    ):
        path = write(tmp_path / "a.json", content)
        with pytest.raises(UserError, match=message):
            list(stream_documents(expand_inputs([path]), reading=Reading()))
