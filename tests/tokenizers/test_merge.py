"""Merging: old ids stay, old merges go first, every line of a real Chinese book decodes to itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2

from megallama.cli import main
from megallama.corpus.script import count_scripts
from megallama.host.errors import UserError
from megallama.tokenizers.compression import measure_compression
from megallama.tokenizers.interface import PieceKind
from megallama.tokenizers.load import SentencePieceTokenizer, load_tokenizer
from megallama.tokenizers.merge import merge_tokenizers
from megallama.tokenizers.training import train_tokenizer
from tests.support.corpus import make_text
from tests.support.materials import LLAMA3, MISTRAL, chinese_chapters

MISTRAL_LOWEST = -1e9
"""The score of its runs of spaces, as in LLaMA."""
SYMBOL = "<|问|>"
ENGLISH = "The wind blows   over 1,234 hills; def f(x): return x ** 2  # naïve 中 café"


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quarter of a real novel, one chapter a line."""
    path = tmp_path_factory.mktemp("book") / "三国.jsonl"
    lines = (json.dumps({"text": chapter}, ensure_ascii=False) for chapter in chinese_chapters()[:30])
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def second(book: Path, tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    folder = tmp_path_factory.mktemp("second")
    path = train_tokenizer([book], folder, vocab_size=6000, user_symbols=[SYMBOL])
    return SentencePieceTokenizer(path)


@pytest.fixture(scope="module")
def merged(
    second: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> SentencePieceTokenizer:
    report = merge_tokenizers(MISTRAL, second.path, tmp_path_factory.mktemp("merged"))
    assert report.old_size == 32_000 < report.new_size
    return SentencePieceTokenizer(report.path)


@pytest.fixture(scope="module")
def first() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(MISTRAL)


def boundaries(tokenizer: SentencePieceTokenizer, text: str) -> set[int]:
    """Byte offsets of `text` at which a token ends."""
    ends, at = set(), 0
    for token in tokenizer.split(text.encode()):
        at += len(tokenizer.surface(token))
        ends.add(at)
    return ends


def test_every_old_id_keeps_its_piece_type_and_score(
    first: SentencePieceTokenizer, merged: SentencePieceTokenizer
) -> None:
    assert list(merged.proto.pieces[: first.vocab_size]) == list(first.proto.pieces)
    assert merged.proto.normalizer_spec == first.proto.normalizer_spec
    assert (merged.eod_id, merged.bos_id) == (first.eod_id, first.bos_id)
    assert merged.proto.trainer_spec.vocab_size == merged.vocab_size


def _rescaled(path: Path, lowest: float) -> Path:
    """Mistral's model with another score for its runs of spaces."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(MISTRAL.read_bytes())
    for piece in proto.pieces:
        if piece.score == MISTRAL_LOWEST:
            piece.score = lowest
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize("lowest", [MISTRAL_LOWEST, -(2.0**24) + 5, -1e30, None])
def test_new_scores_are_distinct_and_below_the_old_ones_as_stored(
    second: SentencePieceTokenizer, corpus: Path, tmp_path: Path, lowest: float | None
) -> None:
    if lowest is None:
        one = train_tokenizer([corpus], tmp_path / "one", vocab_size=390)
    else:
        one = _rescaled(tmp_path / "one.model", lowest)
    report = merge_tokenizers(one, second.path, tmp_path / "both", max_pieces=300)
    pieces = SentencePieceTokenizer(report.path).proto.pieces
    scores = [piece.score for piece in pieces[report.old_size :]]
    assert len(scores) == 300 and scores == sorted(set(scores), reverse=True)
    assert scores[0] < min(piece.score for piece in pieces[: report.old_size])
    order = [piece.piece for piece in pieces[report.old_size :] if piece.piece != SYMBOL]
    theirs = [piece.piece for piece in sorted(second.proto.pieces, key=lambda piece: -piece.score)]
    assert order == [piece for piece in theirs if piece in set(order)], (
        "the order of the second model's merges"
    )


def test_scores_that_have_none_below_them_are_refused(second: SentencePieceTokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the lowest score that there is"):
        merge_tokenizers(_rescaled(tmp_path / "one.model", -3.4028234e38), second.path, tmp_path / "both")


def test_each_piece_is_there_once_and_none_of_the_second_is_lost(
    merged: SentencePieceTokenizer, second: SentencePieceTokenizer
) -> None:
    labels = [merged.label(token) for token in range(merged.vocab_size)]
    assert len(set(labels)) == len(labels)
    kinds = (PieceKind.normal, PieceKind.user)
    wanted = {second.label(t) for t in range(second.vocab_size) if second.kind(t) in kinds}
    assert wanted <= set(labels)
    added = [merged.kind(token) for token in range(32_000, merged.vocab_size)]
    assert added.count(PieceKind.user) == 1 and set(added) == {PieceKind.user, PieceKind.normal}


def test_every_line_decodes_to_itself(merged: SentencePieceTokenizer) -> None:
    for line in "\n".join(chinese_chapters()).split("\n"):
        assert merged.decode(merged.encode(line)) == line
    for number in range(20):
        text = make_text(number)
        assert merged.decode(merged.encode(text)) == text


def test_new_tokens_are_old_ones_joined(
    first: SentencePieceTokenizer, merged: SentencePieceTokenizer
) -> None:
    lines = "\n".join(chinese_chapters()[40:50]).split("\n") + make_text(1).split("\n") + [ENGLISH]
    for line in lines:
        assert boundaries(merged, line) <= boundaries(first, line), line


def test_latin_text_is_cut_as_before_and_chinese_shorter(
    first: SentencePieceTokenizer, merged: SentencePieceTokenizer
) -> None:
    assert merged.encode(ENGLISH) == first.encode(ENGLISH)
    lines = "\n".join(chinese_chapters()[30:35]).split("\n") + [ENGLISH]
    counts = measure_compression(lines, [first, merged])
    assert list(counts)[0] == "chinese" and list(counts)[-1] == "all"
    chinese = counts["chinese"]
    assert chinese.tokens_per_character(1) < 0.7 * chinese.tokens_per_character(0)
    assert counts["all"].tokens[1] == sum(len(merged.encode(line)) for line in lines)
    assert counts["all"].changed_lines == [0, 0]


def test_a_user_symbol_is_one_token(merged: SentencePieceTokenizer) -> None:
    ids = merged.split(f"甲{SYMBOL}乙".encode())
    assert [merged.label(i) for i in ids if i >= 32_000 and merged.kind(i) is PieceKind.user] == [SYMBOL]


def test_pieces_can_be_limited_by_number_and_script(second: SentencePieceTokenizer, tmp_path: Path) -> None:
    report = merge_tokenizers(MISTRAL, second.path, tmp_path, max_pieces=500, scripts=["han"])
    assert report.new_size == 32_500 and report.skipped["beyond max_pieces"] > 0
    pieces = [piece.piece for piece in SentencePieceTokenizer(report.path).proto.pieces]
    assert set("".join(pieces[32_000:])) <= set(pieces), (
        "a piece without its characters is none in a tokenizer.json"
    )
    loaded = load_tokenizer(report.path)
    for token in range(32_000, 32_500):
        assert set(count_scripts(loaded.surface(token).decode())) - {"none"} == {"han"}
    # The commonest new word of the book is among them.
    assert (
        len(loaded.split("曹操".encode())) == 1 and len(load_tokenizer(MISTRAL).split("曹操".encode())) == 2
    )


def test_unigram_models_merge_too(book: Path, corpus: Path, tmp_path: Path) -> None:
    one = train_tokenizer([corpus], tmp_path / "one", vocab_size=390, model_type="unigram")
    two = train_tokenizer([book], tmp_path / "two", vocab_size=4000, model_type="unigram")
    report = merge_tokenizers(one, two, tmp_path / "both")
    loaded, old = SentencePieceTokenizer(report.path), SentencePieceTokenizer(one)
    assert list(loaded.proto.pieces[:390]) == list(old.proto.pieces)
    scores = [piece.score for piece in loaded.proto.pieces[390:]]
    assert scores == sorted(set(scores), reverse=True) and scores[0] < min(p.score for p in old.proto.pieces)
    line = max(chinese_chapters()[3].split("\n"), key=len)
    assert loaded.decode(loaded.encode(line)) == line
    assert len(loaded.encode(line)) < 0.5 * len(old.encode(line))


def test_pieces_that_the_first_normalizes_away_are_left_out(book: Path, corpus: Path, tmp_path: Path) -> None:
    one = train_tokenizer([corpus], tmp_path / "one", vocab_size=450, normalization="nfkc")
    two = train_tokenizer([book], tmp_path / "two", vocab_size=4000)
    report = merge_tokenizers(one, two, tmp_path / "both")
    assert report.skipped["changed by the first's normalization"] > 0
    loaded = load_tokenizer(report.path)
    labels = {loaded.label(token) for token in range(450, report.new_size)}
    assert "，" not in labels and any("曹" in label for label in labels)


def test_senseless_merges_are_refused(
    second: SentencePieceTokenizer, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unigram = train_tokenizer([corpus], tmp_path / "unigram", vocab_size=390, model_type="unigram")
    (tmp_path / "file").write_text("x")
    for arguments, message in [
        ([MISTRAL, unigram, tmp_path / "out"], "different types (bpe and unigram"),
        ([LLAMA3, second.path, tmp_path / "out"], "a .model file; of an imported model it lies in"),
        ([MISTRAL, MISTRAL, tmp_path / "out"], "adds nothing"),
        ([MISTRAL, second.path, tmp_path / "file"], "is a file"),
        ([MISTRAL, tmp_path / "none.model", tmp_path / "out"], "does not exist"),
    ]:
        code = main(["tokenizer", "merge", *map(str, arguments[:2]), "--output", str(arguments[2])])
        assert code == 2 and message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="max_pieces"):
        merge_tokenizers(MISTRAL, second.path, tmp_path / "out", max_pieces=0)


def test_a_model_that_marks_spaces_behind_words_is_refused(
    second: SentencePieceTokenizer, tmp_path: Path
) -> None:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.CopyFrom(second.proto)
    proto.trainer_spec.treat_whitespace_as_suffix = True
    (tmp_path / "suffix.model").write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match="space mark"):
        merge_tokenizers(MISTRAL, tmp_path / "suffix.model", tmp_path / "out")


def test_merge_and_inspect_report(
    second: SentencePieceTokenizer, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(MISTRAL), str(second.path), "--output", str(tmp_path / "out"), "--text", str(book)]
    assert main(["tokenizer", "merge", *arguments, "--sample-mb", "0.2"]) == 0
    out = capsys.readouterr().out
    assert "32,000 ids as before" in out and "0 before, 0 after" in out
    row = next(line for line in out.splitlines() if line.startswith("chinese")).split()
    assert float(row[3]) < 0.7 * float(row[2])
    assert main(["tokenizer", "inspect", str(tmp_path / "out"), "--text", "曹操败走华容道"]) == 0
    shown = capsys.readouterr().out
    for part in ("<s> (1)", "</s> (2)", "byte 256", "user 1", "Chinese by length", "|曹操|"):
        assert part in shown, shown


@pytest.mark.parametrize("path", [LLAMA3, MISTRAL])
def test_published_tokenizers_can_be_inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "han " in out and "举头望明月" in out and "decodes to" not in out
