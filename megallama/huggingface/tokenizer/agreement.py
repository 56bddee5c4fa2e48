"""Whether transformers cuts texts into the tokens of training: asked of the exported folder itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from megallama.host.errors import UserError
from megallama.huggingface.tokenizer.run_data import prefixes_of_run
from megallama.tokenizers.interface import Tokenizer
from megallama.tokens.token_file import TokenFile

TEXTS = (
    "a",
    " a",
    "  a  b   c",
    "a ",
    "    if x:\n        return y\n",
    "\t\ta\tb\n\n\n c\r\nd\r\n",
    "The quick brown fox doesn't jump, it's lazy: I'LL SEE.",
    "1 12 123 1234 12345678901234567890 3.14159 1,000,000",
    "却说曹操大军行至赤壁，时值冬月。“何往？”",
    "　　话说天下大势，分久必合，合久必分。",
    "中文English混排123测试，한국어 テスト ภาษาไทย हिन्दी العربية עברית",
    "😀👨‍👩‍👧‍👦🇨🇳 é e\u0301 ﬁ Ⅳ ½ ＡＢＣ",
    "\u00a0\u2003\u3000\ufeff\u200b x",
    "x^2 + y_1 = \\frac{a}{b} // == != <= >= -> => ::",
    "https://example.org/a?b=c&d=%20#e user@example.org",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa                                      ------------------------",
    "𠀀𪚥 \u0000 \u0001 \u2028 \u2029",
)
"""What tokenizers like to disagree about."""

_SAMPLE_TEXTS, _SAMPLE_TOKENS = 200, 400


def sample_of_run(run: Path, tokenizer: Tokenizer) -> list[str]:
    """Beginnings of documents that the run was trained on, as far as its data are still there."""
    files = []
    for prefix in prefixes_of_run(run):
        try:
            files.append(TokenFile(prefix))
        except (UserError, OSError):
            continue
    each = -(-_SAMPLE_TEXTS // max(1, len(files)))
    return [text for file in files for text in itertools.islice(_beginnings(file, tokenizer), each)]


def _beginnings(file: TokenFile, tokenizer: Tokenizer) -> Iterator[str]:
    step = max(1, file.num_documents // _SAMPLE_TEXTS)
    for first in range(0, file.num_documents, step):
        start, *_ = file.document_starts(first, first + 1)
        ids = file.view(int(start), min(_SAMPLE_TOKENS, file.num_tokens - int(start))).tolist()
        ids = ids[: ids.index(tokenizer.eod_id)] if tokenizer.eod_id in ids else ids
        if ids and max(ids) < tokenizer.vocab_size:
            yield tokenizer.decode(ids).rstrip("\ufffd")


def disagreements(
    folder: Path, tokenizer: Tokenizer, sample: Iterable[str], *, begin_id: int | None
) -> list[str]:
    """What differs between `tokenizer` and what transformers makes of `folder`, a sentence each.

    Args:
        folder: The exported folder.
        tokenizer: That of training.
        sample: Texts to compare beside `TEXTS`.
        begin_id: The token that stood before each text in training.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever its many classes raise
        reason = " ".join(str(error).split())[:200]
        return [f"transformers cannot read the exported tokenizer ({reason}): use the tokenizer of training"]

    def of_transformers(text: str) -> list[int]:
        return list(theirs.encode(text, add_special_tokens=False))

    names = tokenizer.special_tokens()
    texts = [text for text in (*TEXTS, *sample) if not any(name in text for name in names)]
    differing = [text for text in texts if of_transformers(text) != tokenizer.encode(text)]
    found = []
    if differing:
        text = min(differing, key=len)
        found.append(
            f"transformers cuts {len(differing)} of {len(texts)} texts into other tokens than training did:"
            f" {_shortest(text, tokenizer, of_transformers)}"
        )
    dressed, plain = list(theirs("a").input_ids), of_transformers("a")
    before = dressed[: len(dressed) - len(plain)] if dressed[-len(plain) :] == plain else dressed
    wanted = [begin_id] if begin_id is not None else []
    if before != wanted:
        found.append(
            f"transformers puts {before} before a text and training put {wanted}: set add_bos_token in"
            " tokenizer_config.json, and the post_processor of tokenizer.json, to what training did"
        )
    text = tokenizer.label(tokenizer.eod_id)
    if of_transformers(text) != tokenizer.encode(text):
        found.append(
            "transformers reads the name of a special token in a text as that token, training as plain text:"
            f" {text!r} is {of_transformers(text)} there and {tokenizer.encode(text)} here"
        )
    return found


def _shortest(text: str, tokenizer: Tokenizer, of_transformers: Callable[[str], list[int]]) -> str:
    """What is left of `text` when all is taken away without which it still differs, with both ways to cut it."""
    step = len(text) // 2
    while step:
        for start in range(0, len(text), step):
            part = text[:start] + text[start + step :]
            if part and of_transformers(part) != tokenizer.encode(part):
                text = part
                break
        else:
            step //= 2
    theirs, ours = _some(of_transformers(text)), _some(tokenizer.encode(text))
    return f"{text[:40]!r} is {theirs} there and {ours} here"


def _some(ids: list[int]) -> str:
    return f"{ids[:12]}{' ...' if len(ids) > 12 else ''}"
