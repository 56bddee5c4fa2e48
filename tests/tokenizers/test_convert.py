"""A tokenizer.json made of a rank file or a sentencepiece model gives the same ids for any text."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tokenizers
from megallama.tokenizers.convert import tokenizer_json
from megallama.tokenizers.interface import Tokenizer
from megallama.tokenizers.load import load_tokenizer
from megallama.tokenizers.merge import merge_tokenizers
from megallama.tokenizers.training import train_tokenizer
from tests.support.materials import FOLDER, LLAMA3, MISTRAL, QWEN, QWEN35, chinese_chapters
from tests.tokenizers.test_rank_files import describe, small

MISTRAL_V3 = FOLDER / "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3"
FILES = {"Mistral": MISTRAL, "Mistral 3": MISTRAL_V3, "LLaMA 3": LLAMA3, "Qwen": QWEN, "Qwen 3.5": QWEN35}
TRAINED = {
    "bpe": {},
    "user symbols": {"user_symbols": ["<|user|>", "<pad>", "<end of turn>"]},
    "unigram": {"model_type": "unigram"},
    "nfkc": {"normalization": "nfkc"},
    "no bytes": {"byte_fallback": False},
}
LETTERS = " \n\t\r\u3000\u00a0aAsS'1中国曹操。，é\u0301ſK😀_-<|>/\u2581ＡＢ½"
TEXTS = st.lists(
    st.one_of(
        st.text(LETTERS, max_size=12),
        st.text(max_size=4),
        st.sampled_from(
            [
                " " * 7,
                " " * 19,
                "\n\n\n",
                "aaaaaaa",
                "-----",
                "却说曹操",
                "I'LL",
                "<|user|>",
                "<end of turn>",
                "</s>",
            ]
        ),
    ),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A tokenizer and its tokenizer.json, by name; made once."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text.txt").write_text("\n".join(chinese_chapters()[:3]) + "\nI'll <|user|> 12\n" * 9, "utf-8")
    found: dict[str, tuple[Tokenizer, tokenizers.Tokenizer]] = {}

    def load(name: str) -> tuple[Tokenizer, tokenizers.Tokenizer]:
        if name not in found:
            path = FILES.get(name)
            if name in TRAINED:
                path = train_tokenizer([folder / "text.txt"], folder / name, vocab_size=2300, **TRAINED[name])
            if name == "merged":
                path = merge_tokenizers(MISTRAL, load("bpe")[0].path, folder / name, scripts=["han"]).path
            if path is None:
                (folder / "ranks").mkdir()
                path = small(folder / "ranks" / "small.tiktoken")
                describe(path, normalization="NFC", special_tokens={"<|完|>": 300, "<|空|>": 290})
            tokenizer = load_tokenizer(path)
            made = tokenizer_json(tokenizer)
            made.encode_special_tokens = True  # as in training, where their names in a text are text
            found[name] = tokenizer, tokenizers.Tokenizer.from_str(made.to_str())
            found[name][1].encode_special_tokens = True
        return found[name]

    return load


PUBLISHED = [pytest.param(name, marks=pytest.mark.long) for name in ("LLaMA 3", "Qwen", "Qwen 3.5")]


@pytest.mark.parametrize("name", ["small ranks", "Mistral", "Mistral 3", *TRAINED, "merged", *PUBLISHED])
def test_ids_of_any_text_are_the_same(name, loaded):
    ours, theirs = loaded(name)

    @settings(max_examples=100, deadline=None)
    @given(TEXTS)
    def compare(text):
        # A Unigram model of Hugging Face reads the names of tokens out of texts; the export says so.
        assume(name != "unigram" or not re.search("<(s|/s|unk|0x..)>", text))
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids
        if name != "no bytes":  # each shows an unknown character in its own way
            assert theirs.decode(ids) == ours.decode(ids)

    if name != "nfkc":  # Hugging Face's normalizes combining characters one by one
        compare()
    for line in "\n".join(chinese_chapters()[:3]).split("\n"):
        assert theirs.encode(line, add_special_tokens=False).ids == ours.encode(line)


@pytest.mark.parametrize("name", ["small ranks", "Mistral", "Mistral 3", "user symbols", *PUBLISHED])
def test_special_tokens_keep_their_ids(name, loaded):
    ours, theirs = loaded(name)
    assert theirs.get_vocab_size() == len([t for t in range(ours.vocab_size) if ours.label(t)])
    for token in range(ours.vocab_size):
        if ours.kind(token).value in ("special", "user"):
            assert theirs.token_to_id(ours.label(token).replace("\u2581", " ")) == token
    theirs.encode_special_tokens = False
    end = ours.label(ours.eod_id)
    text = f"曹操{end}曹操"
    assert theirs.encode(text, add_special_tokens=False).ids.count(ours.eod_id) == 1
    theirs.encode_special_tokens = True
