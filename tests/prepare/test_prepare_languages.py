"""What a preparation tells of the languages of its text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megallama.cli import main

LANGUAGES = {
    "甲.txt": "训练需要高质量的中文语料。",
    "乙.txt": "用 PyTorch 训练一个语言模型，需要很多文本。",
    "丙.txt": "東京都は日本の首都です。",
    "d.txt": "The model learns from a lot of text.",
    "数.txt": "12345 !?",
}


def test_documents_and_bytes_of_each_likely_language_are_counted(
    tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed, plain = tmp_path / "混", tmp_path / "纯"
    for folder, names in ((mixed, LANGUAGES), (plain, ["甲.txt"])):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(LANGUAGES[name], encoding="utf-8")
    out = tmp_path / "out"
    words = ["prepare", str(mixed), str(plain), "--tokenizer", str(tokenizer_path), "--output", str(out)]
    assert main([*words, "--workers", "1"]) == 0
    size = {name: len(text.encode()) for name, text in LANGUAGES.items()}
    first, second = json.loads((out / "prepared.json").read_text(encoding="utf-8"))["sources"]
    assert first["languages"] == {
        "chinese": {"documents": 2, "text_bytes": size["甲.txt"] + size["乙.txt"]},
        "japanese": {"documents": 1, "text_bytes": size["丙.txt"]},
        "latin": {"documents": 1, "text_bytes": size["d.txt"]},
        "none": {"documents": 1, "text_bytes": size["数.txt"]},
    }
    assert second["languages"] == {"chinese": {"documents": 1, "text_bytes": size["甲.txt"]}}
    assert first["text_bytes"] == sum(size.values())
    shown = capsys.readouterr().out
    share = (size["甲.txt"] + size["乙.txt"]) / sum(size.values())
    assert f"likely languages: chinese 2 documents ({share:.0%} of bytes), " in shown
    assert "likely languages: chinese 1 documents (100% of bytes)\n" in shown
