"""Training: determinism, sampling, digits, silence, errors."""

from __future__ import annotations

import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from megallama.cli import main
from megallama.host.errors import UserError
from megallama.host.limits import memory_bytes
from megallama.tokenizers import training
from megallama.tokenizers.interface import PieceKind
from megallama.tokenizers.load import load_tokenizer
from megallama.tokenizers.training import sample_lines, train_tokenizer, training_memory
from tests.support.corpus import CHINESE


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_the_same_seed_gives_the_same_file(corpus: Path, tmp_path: Path, model_type: str) -> None:
    written = [
        train_tokenizer(
            [corpus],
            tmp_path / name,
            vocab_size=380,
            model_type=model_type,  # type: ignore[arg-type]
            sample_bytes=20_000,
            seed=seed,
        )
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    a, b, c = (path.read_bytes() for path in written)
    assert a == b != c
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["tokenizer.model"]
    assert load_tokenizer(written[0]).vocab_size == 380


@pytest.mark.parametrize("split_digits", [True, False])
def test_digits_stand_alone_unless_told_otherwise(tmp_path: Path, split_digits: bool) -> None:
    text = tmp_path / "years.txt"
    text.write_text("in 2024 and in 2025\n二〇二四年是2024年\n" * 50, encoding="utf-8")
    path = train_tokenizer([text], tmp_path / "out", vocab_size=290, split_digits=split_digits)
    loaded = load_tokenizer(path)
    pieces = [loaded.decode([i]) for i in loaded.encode("in 2024")]
    assert (pieces[-4:] == list("2024")) is split_digits
    assert loaded.decode(loaded.encode("in 2024")) == "in 2024"


def test_indentation_and_chinese_words_become_pieces(tokenizer_path: Path) -> None:
    loaded = load_tokenizer(tokenizer_path)
    assert "    " in [loaded.decode([i]) for i in loaded.encode("    for item in batch:")]
    assert len(loaded.encode(CHINESE)) < len(CHINESE), "common Chinese words should be pieces, not bytes"


def test_training_is_quiet(corpus: Path, tmp_path: Path) -> None:
    program = (
        "from megallama.tokenizers.training import train_tokenizer\n"
        f"train_tokenizer([{str(corpus)!r}], {str(tmp_path)!r}, vocab_size=400)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_sample_is_bounded_seeded_ordered_and_spread() -> None:
    texts = [f"第{number:05}行\n" for number in range(5000)]
    size = len(texts[0].encode()) - 1
    sample = sample_lines(iter(texts), seed=7, sample_bytes=1000 * size)
    assert len(sample) == 1000
    assert sample == sorted(sample) == sample_lines(iter(texts), seed=7, sample_bytes=1000 * size)
    assert sample != sample_lines(iter(texts), seed=8, sample_bytes=1000 * size)
    late = sum(line >= "第02500" for line in sample)
    assert 400 < late < 600
    assert len(sample_lines(iter(texts), seed=7, sample_bytes=10**9)) == 5000


def test_a_sample_takes_its_own_size_of_memory_and_once(tmp_path: Path) -> None:
    line = CHINESE * 3
    text = "\n".join(f"{number} {line}" for number in range(20_000))
    size = len(text.encode())
    tracemalloc.start()
    try:
        sample = sample_lines(iter([text]), seed=7, sample_bytes=size // 10)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    strings = sum(map(sys.getsizeof, sample))
    assert len(sample) > 1900 and held < 1.2 * strings and peak < 2 * strings, (held, peak, strings)


def test_what_a_sample_costs_is_told_before_the_corpus_is_read(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def train(sample_bytes: int) -> None:
        told.clear()
        train_tokenizer(
            [corpus],
            tmp_path,
            vocab_size=390,
            overwrite=True,
            sample_bytes=sample_bytes,
            announce=told.append,
        )

    train(10**10)
    assert len(told) == 1 and re.search(r"in silence, with up to \d\.\d MB of memory$", told[0])
    monkeypatch.setattr(training, "memory_bytes", lambda: 10**6)
    train(10**10)
    assert re.match(
        r"a sample of 0\.1 MB takes up to \d\.\d MB of memory .* has 1\.0 MB: give --sample-mb 1 or", told[0]
    )
    train(30_000)
    assert len(told) == 1, "what is sampled fits"
    assert training_memory(10**10) > 200e9 and memory_bytes() > 1e8


def test_long_lines_are_cut_not_dropped() -> None:
    line = CHINESE * 1000
    sample = sample_lines(iter([line]), seed=0, sample_bytes=10**9)
    assert "".join(sample) == line and max(map(len, sample)) <= 4096
    # Old Macs end lines with CR alone; where there is LF, a CR inside a line stays there.
    assert sample_lines(iter(["一\r二\r\r", "c\rd\r\n"]), seed=0, sample_bytes=99) == ["一", "二", "c\rd"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 100_000}, r"vocab_size \(100000\) is too large.*vocab_size=\d+ or less"),
        ({"vocab_size": 100}, r"vocab_size \(100\) must be above 259"),
        ({"vocab_size": 262}, r"vocab_size \(262\) is smaller than"),
        ({"model_type": "wordpiece"}, "model_type"),
        ({"character_coverage": 2.0}, "character_coverage"),
        ({"sample_bytes": 0}, "sample_bytes"),
        ({"normalization": "nfkz"}, "nfkz"),
    ],
)
def test_impossible_settings_say_what_to_change(
    corpus: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train_tokenizer([corpus], tmp_path / "out", **{"vocab_size": 400, **options})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_user_symbols_are_one_token_wherever_they_stand(corpus: Path, tmp_path: Path) -> None:
    symbols = ["<|用户|>", "##", "<end of turn>", " 轮  次", 'a,"b']
    path = train_tokenizer([corpus], tmp_path, vocab_size=390, user_symbols=symbols)
    loaded = load_tokenizer(path)
    for symbol in symbols:
        for text in (symbol, f"模型{symbol}x", f"a {symbol} {symbol}"):
            ids = loaded.encode(text)
            assert loaded.decode(ids) == text and loaded.encode_batch([text]) == [ids]
            assert [loaded.surface(i).decode() for i in ids].count(symbol) == text.count(symbol)
    labels = [loaded.label(i) for i in loaded.encode("a##中<|用户|>模型")]
    assert [label for label in labels if label in symbols] == ["##", "<|用户|>"]
    assert {loaded.kind(i) for i in loaded.encode("##")} == {PieceKind.user}


@pytest.mark.parametrize("symbol", ["", " ", "a\u2581b", "</s>"])
def test_symbols_that_cannot_be_tokens_are_refused(corpus: Path, tmp_path: Path, symbol: str) -> None:
    with pytest.raises(UserError, match="user symbol"):
        train_tokenizer([corpus], tmp_path / "out", vocab_size=390, user_symbols=[symbol])
    with pytest.raises(UserError, match="would never be found: write it without what changes"):
        train_tokenizer(
            [corpus], tmp_path / "out", vocab_size=390, normalization="nfkc", user_symbols=["问 １"]
        )
    with pytest.raises(UserError, match="given twice"):
        train_tokenizer([corpus], tmp_path / "out", vocab_size=390, user_symbols=["甲", "甲"])


def test_normalization_and_byte_fallback_are_choices(corpus: Path, tmp_path: Path) -> None:
    wide = load_tokenizer(train_tokenizer([corpus], tmp_path / "wide", vocab_size=390, normalization="nfkc"))
    assert wide.decode(wide.encode("模型，Ａ")) == "模型,A"
    plain = load_tokenizer(train_tokenizer([corpus], tmp_path / "plain", vocab_size=134, byte_fallback=False))
    assert PieceKind.byte not in {plain.kind(i) for i in range(134)}
    assert "龘" not in plain.decode(plain.encode("龘"))


def test_progress_is_told_while_the_sample_is_taken(corpus: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    train_tokenizer(
        [corpus], tmp_path, vocab_size=390, progress=lambda done, total: told.append((done, total))
    )
    size = sum(path.stat().st_size for path in corpus.rglob("*.txt"))
    assert told == sorted(told) and told[-1] == (size, size) and len(told) == 40


def test_what_train_said_is_possible_is_possible(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocab_size=") as caught:
        train_tokenizer([corpus], tmp_path, vocab_size=100_000)
    possible = int(str(caught.value).split("vocab_size=")[1].split()[0])
    assert load_tokenizer(train_tokenizer([corpus], tmp_path, vocab_size=possible)).vocab_size == possible


def test_an_empty_corpus_and_a_file_as_output_are_refused(corpus: Path, tmp_path: Path) -> None:
    blank = tmp_path / "空.txt"
    blank.write_text(" \n\n", encoding="utf-8")
    with pytest.raises(UserError, match="empty"):
        train_tokenizer([blank], tmp_path / "out", vocab_size=400)
    with pytest.raises(UserError, match="is a file"):
        train_tokenizer([corpus], blank, vocab_size=400)


def test_lines_between_documents_are_not_learned(tmp_path: Path) -> None:
    text = tmp_path / "三国.txt"
    text.write_text("\n＊卷＊\n".join([CHINESE, "话说天下大势，分久必合"] * 50), encoding="utf-8")
    words = ["tokenizer", "train", str(text), "--vocab-size", "330", "--character-coverage", "1"]
    learned = []
    for name, extra in (("with", []), ("without", ["--separator", "＊卷＊"])):
        assert main([*words, *extra, "--output", str(tmp_path / name)]) == 0
        loaded = load_tokenizer(tmp_path / name)
        learned.append({loaded.decode([i]) for i in range(259, loaded.vocab_size)})
    assert "卷" in "".join(learned[0]) and "卷" not in "".join(learned[1])
    assert "势" in "".join(learned[1])


def test_a_tokenizer_is_replaced_only_when_asked(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "词表"
    words = ["tokenizer", "train", str(corpus), "--output", str(out), "--vocab-size"]
    assert main([*words, "390"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("training bpe of 390 ids on ") and " of 40 files: " in said
    before = (out / "tokenizer.model").read_bytes()
    message = f"error: output {out} holds a tokenizer already (tokenizer.model)"
    assert main([*words, "400"]) == 2
    assert capsys.readouterr().err.startswith(message)
    assert (out / "tokenizer.model").read_bytes() == before
    merge = ["tokenizer", "merge", str(out), str(out), "--output", str(out)]
    assert main(merge) == 2
    assert capsys.readouterr().err.startswith(message)
    assert main([*words, "400", "--overwrite"]) == 0
    assert load_tokenizer(out).vocab_size == 400


def test_an_output_that_cannot_be_written_is_told_before_the_corpus_is_read(
    corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    told: list[object] = []
    with pytest.raises(UserError, match="tokenizer .*tokenizer.model cannot be written .Not a directory"):
        train_tokenizer(
            [corpus],
            tmp_path / "file" / "out",
            vocab_size=390,
            progress=lambda *numbers: told.append(numbers),
            announce=told.append,
        )
    assert told == []
