"""Trains a sentencepiece tokenizer on a seeded sample of a corpus."""

from __future__ import annotations

import heapq
import io
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import sentencepiece

from megallama.corpus.corpus import (
    CorpusFile,
    Documents,
    Reading,
    empty_corpus,
    expand_inputs,
    stream_documents,
)
from megallama.corpus.inputs import describe_passed_over
from megallama.host.errors import UserError
from megallama.host.files import write_whole
from megallama.host.limits import memory_bytes
from megallama.tokenizers.files import SENTENCEPIECE_FILE
from megallama.tokenizers.interface import SPACE_MARK

ModelType = Literal["bpe", "unigram"]

Normalization = Literal["identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"]
"""sentencepiece's rules. All but `identity` change the text: full-width Chinese punctuation becomes ASCII."""

_MAX_LINE_CHARS = 4096
# Not the number of cores: unigram sums by thread, and the file must not depend on the machine.
_NUM_THREADS = 16
_MEMORY_A_BYTE = 24
"""What sentencepiece 0.2.3 takes for BPE of Chinese, where each line is one word to it (measured: 22 on 20 MB, the
sample included). English takes half of it, and Unigram 19 to 21."""
_BYTE_AND_CONTROL_PIECES = 256 + 3


def train_tokenizer(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    vocab_size: int,
    model_type: ModelType = "bpe",
    character_coverage: float = 0.9995,
    split_digits: bool = True,
    byte_fallback: bool = True,
    normalization: Normalization = "identity",
    user_symbols: Sequence[str] = (),
    seed: int = 1234,
    sample_bytes: int = 100 << 20,
    suffixes: Sequence[str] = (),
    documents: Documents = "file",
    separator: str = "",
    text_field: str = "text",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    announce: Callable[[str], None] | None = None,
) -> Path:
    """Trains a tokenizer on `inputs` and writes `<output>/tokenizer.model`; returns that path.

    Ids: 0 unknown, 1 begin, 2 end, then 256 bytes, then pieces. With the default `normalization`
    what is encoded decodes to the very same text, white space included (only U+2581, sentencepiece's
    own mark for a space, becomes a space). A corpus above `sample_bytes` is sampled by lines, each
    line with equal chance. The same inputs and seed give the same file. `user_symbols` are each one token
    wherever they stand. Without `byte_fallback` a character that the sample lacks is lost. `progress` is called
    with (bytes of text read, bytes of the files) while the sample is taken, `announce` with one line when the
    training begins, which sentencepiece does in silence.

    Raises:
        UserError: inputs that `expand_inputs` or `read_documents` refuse, an empty corpus, a
            vocabulary too large or too small for it, an output that cannot be written or has a
            tokenizer already, without `overwrite`.
    """
    reserved = len(user_symbols) + (_BYTE_AND_CONTROL_PIECES if byte_fallback else 3)
    _check_arguments(vocab_size, model_type, character_coverage, sample_bytes, reserved)
    if normalization not in get_args(Normalization):
        raise UserError(
            f"normalization ({normalization!r}) is unknown: use {', '.join(get_args(Normalization))}"
        )
    _check_symbols(user_symbols, normalization)
    folder = Path(output)
    check_model_output(folder, overwrite=overwrite)
    passed_over: Counter[str] = Counter()
    files = expand_inputs(inputs, suffixes=suffixes, text_field=text_field, passed_over=passed_over)
    if announce is not None:
        _announce_memory(files, sample_bytes, announce)
    reading = Reading(documents=documents, text_field=text_field, separator=separator)
    lines = sample_lines(_texts(files, reading, progress), seed=seed, sample_bytes=sample_bytes)
    if not lines:
        raise empty_corpus(files)
    if announce is not None:
        size = sum(map(_size, lines))
        duration = "minutes" if model_type == "bpe" else "hours"
        memory = _amount(training_memory(size))
        announce(
            f"training {model_type} of {vocab_size:,} ids on {len(lines):,} lines ({_amount(size)}) of"
            f" {len(files):,} files: {duration} for some hundred MB, in silence, with up to {memory} of memory"
            + (f" (not read: {describe_passed_over(passed_over)})" if passed_over else "")
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_handed_over(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            split_digits=split_digits,
            normalization_rule_name=normalization,
            byte_fallback=byte_fallback,
            # As the text has them when pieces are searched for in it.
            user_defined_symbols=[symbol.replace(" ", SPACE_MARK) for symbol in user_symbols],
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation is worth pieces of its own
            max_sentence_length=_MAX_LINE_CHARS * 4 + 1,
            num_threads=_NUM_THREADS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise _training_failed(str(error), vocab_size) from error
    return write_model(folder, model.getvalue())


def sample_lines(texts: Iterator[str], *, seed: int, sample_bytes: int) -> list[str]:
    """Lines of `texts` in order, at most `sample_bytes` of UTF-8 in all, each with the same chance.

    Every line draws a number and the lowest numbers that fit are kept, so memory is bounded by the
    sample. Lines above 4096 characters, usual in Chinese text, are cut: sentencepiece drops long ones.
    """
    draws = random.Random(seed)
    kept: list[tuple[float, int, str]] = []  # a heap with the highest draw on top
    total = 0
    for number, line in enumerate(_lines(texts)):
        heapq.heappush(kept, (-draws.random(), number, line))
        total += _size(line)
        while total > sample_bytes and len(kept) > 1:
            total -= _size(heapq.heappop(kept)[2])
    kept.sort(key=lambda entry: entry[1])
    return [line for _, _, line in kept]


def training_memory(sample_bytes: int) -> int:
    """Bytes of memory that training on so much text takes at most, the sample itself included."""
    return _MEMORY_A_BYTE * sample_bytes


def _size(line: str) -> int:
    return len(line) if line.isascii() else len(line.encode("utf-8"))


def _handed_over(lines: list[str]) -> Iterator[str]:
    """The lines one by one, each forgotten: sentencepiece makes copies of them all."""
    lines.reverse()
    while lines:
        yield lines.pop()


def _texts(
    files: Sequence[CorpusFile], reading: Reading, progress: Callable[[int, int], None] | None
) -> Iterator[str]:
    total = sum(file.num_bytes for file in files)
    done = 0
    for document in stream_documents(files, reading=reading):
        yield document.text
        if progress is not None:
            # Text, not file bytes: compressed files hold more of it, JSON less.
            done += len(document.text.encode())
            progress(min(done, total), total)


def _lines(texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        mark = "\n" if "\n" in text else "\r"
        at = 0
        while at < len(text):  # a list of all lines would be the text a second time
            end = text.find(mark, at)
            end = len(text) if end < 0 else end
            # NUL ends a string inside the trainer; it is still encoded, as a byte.
            line = text[at:end].rstrip("\r").replace("\0", " ")
            at = end + 1
            if not line.strip():
                continue
            for start in range(0, len(line), _MAX_LINE_CHARS):
                yield line[start : start + _MAX_LINE_CHARS]


def _announce_memory(files: Sequence[CorpusFile], sample_bytes: int, announce: Callable[[str], None]) -> None:
    """Says before the corpus is read that the sample may be too large for this machine."""
    expected = min(sample_bytes, sum(file.num_bytes for file in files))
    needed, there = training_memory(expected), memory_bytes()
    if needed > there:
        fits = max(1, there // training_memory(10**6))
        announce(
            f"a sample of {_amount(expected)} takes up to {_amount(needed)} of memory (text without spaces, as Chinese,"
            f" takes the most), and this machine has {_amount(there)}: give --sample-mb {fits} or less"
        )


def _amount(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 10**9 else f"{num_bytes / 1e6:.1f} MB"


def _check_arguments(
    vocab_size: int, model_type: str, character_coverage: float, sample_bytes: int, reserved: int
) -> None:
    if vocab_size <= reserved:
        raise UserError(
            f"vocab_size ({vocab_size}) must be above {reserved}, bytes, control pieces and symbols:"
            " use 1000 or more"
        )
    if model_type not in get_args(ModelType):
        raise UserError(f"model_type ({model_type!r}) is unknown: use {' or '.join(get_args(ModelType))}")
    if not 0.9 <= character_coverage <= 1:
        raise UserError(f"character_coverage ({character_coverage}) must be in [0.9, 1]: use 0.9995")
    if sample_bytes < 1:
        raise UserError(f"sample_bytes ({sample_bytes}) must be at least 1: use some megabytes")


def _check_symbols(symbols: Sequence[str], normalization: Normalization) -> None:
    normalizer = sentencepiece.SentencePieceNormalizer(
        rule_name=normalization,
        add_dummy_prefix=False,
        escape_whitespaces=False,
        remove_extra_whitespaces=False,
    )
    for number, symbol in enumerate(symbols):
        if not symbol.strip() or "\0" in symbol or SPACE_MARK in symbol or symbol in ("<unk>", "<s>", "</s>"):
            raise UserError(f"user symbol ({symbol!r}) cannot be a token: leave it out")
        if symbol in symbols[:number]:
            raise UserError(f"user symbol ({symbol!r}) is given twice: leave one out")
        # Symbols are searched for before normalization, but those with a space, which is a mark then, after it.
        normal = normalizer.normalize(symbol)
        if " " in symbol and normal != symbol:
            raise UserError(
                f"user symbol ({symbol!r}) has a space and becomes {normal!r} under normalization {normalization}, so"
                " it would never be found: write it without what changes, or use --normalization identity"
            )


def _training_failed(text: str, vocab_size: int) -> UserError:
    too_large = re.search(r"Vocabulary size too high.*<= (\d+)", text)
    if too_large:
        return UserError(
            f"vocab_size ({vocab_size}) is too large for this corpus, which yields {too_large[1]} pieces:"
            f" use vocab_size={too_large[1]} or less, or give more text"
        )
    too_small = re.search(r"smaller than required_chars\. (\d+) vs (\d+)", text)
    if too_small:
        return UserError(
            f"vocab_size ({vocab_size}) is smaller than the {too_small[2]} characters and bytes it must hold:"
            f" use more than {too_small[2]}, or lower character_coverage"
        )
    return UserError(f"sentencepiece refused to train ({text.strip()}): change what it names")


def check_model_output(folder: str | Path, *, overwrite: bool) -> None:
    """That a model can be written to `folder` and replaces none; nothing is made there.

    Raises:
        UserError: it cannot, or would, without `overwrite`.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file: name a folder")
    path = folder / SENTENCEPIECE_FILE
    if path.exists() and not overwrite:
        raise UserError(
            f"output {folder} holds a tokenizer already ({SENTENCEPIECE_FILE}); data prepared with it does not fit"
            " another tokenizer: choose another folder, or give --overwrite"
        )
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise _not_writable(path, error) from error


def _not_writable(path: Path, error: OSError) -> UserError:
    return UserError(f"tokenizer {path} cannot be written ({error.strerror}): choose another folder")


def write_model(folder: Path, model: bytes) -> Path:
    """Writes `<folder>/tokenizer.model` whole or not at all."""
    path = folder / SENTENCEPIECE_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, model, has_rivals=True)
    except OSError as error:
        raise _not_writable(path, error) from error
    return path
