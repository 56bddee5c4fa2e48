"""Part of `data.py`: `megallama prepare` against Hugging Face `datasets.map` and Megatron-LM's `preprocess_data.py`.

The corpora are the sources of Python's standard library and the Romance of the Three Kingdoms in Chinese, which
`make setup` brings, as JSON lines, one document a file or chapter; `copies` repeats the documents, each copy with
other numbers and long words, so that no program can answer from what it saw. All three tokenize the same file with
the same tokenizer in one process (Megatron-LM has one more that reads and writes) and write to the disk; the programs
alternate. What counts is the processor time of the whole process tree less that of the same command on a tiny file
(imports, loading the tokenizer): text in MB per second of one core; the clock is shown beside it. The tokens are
compared: a difference ends the benchmark.
"""

from __future__ import annotations

import json
import os
import re
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]

OURS = """
import sys
from megallama.prepare.run import prepare
corpus, output, tokenizer = sys.argv[1:]
prepare([corpus], output, tokenizer=tokenizer, validation_fraction=0, workers=1)
"""

DATASETS = """
import sys, datasets
datasets.disable_progress_bars()
corpus, output, tokenizer = sys.argv[1:]
if tokenizer.endswith(".model"):
    import sentencepiece
    model = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
    end = model.eos_id()
    def encode(batch):
        return {"input_ids": [ids + [end] for ids in model.encode(batch["text"])]}
else:
    import transformers
    model = transformers.PreTrainedTokenizerFast(tokenizer_file=tokenizer, eos_token="<|endoftext|>")
    end = model.eos_token_id
    def encode(batch):
        found = model(batch["text"], add_special_tokens=False, return_attention_mask=False)
        return {"input_ids": [ids + [end] for ids in found["input_ids"]]}
data = datasets.load_dataset("json", data_files=corpus, split="train", cache_dir=output)
data = data.map(encode, batched=True, remove_columns=data.column_names)
data.save_to_disk(output + "/tokens")
"""


def numbered(text: str, copy: int) -> str:
    """`text` with other numbers and long words: the same kind of text, not the same text."""
    if copy == 0:
        return text
    text = re.sub(r"\d+", lambda found: str(int(found[0][:9]) + copy), text)
    return re.sub(r"\b(\w{9,})\b", lambda found: f"{found[0]}_{copy}", text)


def write_corpora(folder: Path, *, copies: int) -> dict[str, Path]:
    from tests.support.materials import chinese_chapters

    library = Path(sysconfig.get_paths()["stdlib"])
    python = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(library.glob("*.py"))]
    corpora = {}
    for name, texts in (("python", python), ("chinese", chinese_chapters())):
        corpora[name] = folder / f"{name}.jsonl"
        with open(corpora[name], "w", encoding="utf-8") as stream:
            for copy in range(copies):
                for text in texts:
                    stream.write(json.dumps({"text": numbered(text, copy)}, ensure_ascii=False) + "\n")
    return corpora


def train_json_tokenizer(corpora: dict[str, Path], folder: Path) -> Path:
    """A byte-level `tokenizer.json` of 16,000 tokens, as GPT-2's family has them."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=16_000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [json.loads(line)["text"] for path in corpora.values() for line in path.open(encoding="utf-8")]
    tokenizer.train_from_iterator(texts[: len(texts) // 2], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def commands(megatron: Path | None) -> dict[str, Callable[[Path, Path, Path], list[str]]]:
    """How each program is started with (corpus, output, tokenizer)."""

    def ours(corpus: Path, output: Path, tokenizer: Path) -> list[str]:
        return [sys.executable, "-W", "ignore", "-c", OURS, str(corpus), str(output), str(tokenizer)]

    def with_datasets(corpus: Path, output: Path, tokenizer: Path) -> list[str]:
        return [sys.executable, "-W", "ignore", "-c", DATASETS, str(corpus), str(output), str(tokenizer)]

    def with_megatron(corpus: Path, output: Path, tokenizer: Path) -> list[str]:
        output.mkdir(parents=True, exist_ok=True)
        is_model = tokenizer.suffix == ".model" or ".model." in tokenizer.name
        kind = "SentencePieceTokenizer" if is_model else "HuggingFaceTokenizer"
        words = [sys.executable, "-W", "ignore", f"{megatron}/tools/preprocess_data.py"]
        words += ["--input", str(corpus), "--output-prefix", f"{output}/out", "--tokenizer-type", kind]
        words += ["--tokenizer-model", str(tokenizer if is_model else tokenizer.parent)]
        return [*words, "--workers", "1", "--append-eod", "--log-interval", "1000000"]

    found = {"megallama": ours, "datasets": with_datasets}
    return found if megatron is None else {**found, "megatron": with_megatron}


def run(words: list[str], *, megatron: Path | None) -> tuple[float, float]:
    """(processor seconds of the process and its children, seconds on the clock)."""
    path = f"{megatron}:{ROOT}" if "preprocess_data.py" in " ".join(words) else str(ROOT)
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    seconds, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"failed: {' '.join(words[:6])} ...\n{done.stdout[-500:]}\n{done.stderr[-3000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, seconds


def tokens_of(program: str, output: Path) -> np.ndarray:
    """All tokens that a program wrote, in order."""
    if program == "datasets":
        import datasets

        return np.concatenate(datasets.load_from_disk(f"{output}/tokens").with_format("numpy")["input_ids"])
    from megallama.tokens.token_file import TokenFile

    file = TokenFile(output / ("train" if program == "megallama" else "out_text_document"))
    return file.view(0, file.num_tokens)


def measure(
    corpus: Path, tokenizer: Path, folder: Path, *, rounds: int, megatron: Path | None
) -> dict[str, list[tuple[float, float]]]:
    """(processor seconds, seconds) of each program and round, without what a tiny corpus costs."""
    tiny = folder / "tiny.jsonl"
    tiny.write_text('{"text": "one"}\n{"text": "two"}\n')
    programs = commands(megatron)
    start: dict[str, tuple[float, float]] = {}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    expected = None
    for turn in range(rounds):
        for name, command in programs.items():
            prefix = folder / f"{corpus.stem}-{tokenizer.parent.name}-{name}-{turn}"
            least = run(command(tiny, Path(f"{prefix}-tiny"), tokenizer), megatron=megatron)
            start[name] = min(start.get(name, least), least)
            output = Path(f"{prefix}-out")
            found[name].append(run(command(corpus, output, tokenizer), megatron=megatron))
            if turn == 0:
                tokens = tokens_of(name, output)
                expected = tokens if expected is None else expected
                if not np.array_equal(expected, tokens):
                    sys.exit(f"{name} gives other tokens ({len(tokens)} against {len(expected)})")
    return {
        name: [(cpu - start[name][0], wall - start[name][1]) for cpu, wall in times]
        for name, times in found.items()
    }


def compare_preparations(
    *, megatron: Path | None, tokenizer: Path | None, copies: int, rounds: int
) -> Iterator[str]:
    """Lines of the report: MB/s of a core of each program, and ours over the better of the others.

    Args:
        megatron: A clone of Megatron-LM; None leaves it out.
        tokenizer: A sentencepiece `.model`; None: the one that `make setup` brings.
        copies: How often the corpora are repeated.
        rounds: How often each program runs.
    """
    from tests.support.materials import MISTRAL

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpora = write_corpora(folder, copies=copies)
        model = folder / "sentencepiece" / "tokenizer.model"  # the name that all programs understand
        model.parent.mkdir()
        model.write_bytes((tokenizer or MISTRAL).read_bytes())
        tokenizers = {
            "sentencepiece": model,
            "tokenizer.json": train_json_tokenizer(corpora, folder / "json"),
        }
        for kind, file in tokenizers.items():
            for corpus in corpora.values():
                lines = corpus.read_text(encoding="utf-8").splitlines()
                size = sum(len(json.loads(line)["text"].encode()) for line in lines) / 1e6
                times = measure(corpus, file, folder, rounds=rounds, megatron=megatron)
                yield from _report(f"{kind}, {corpus.stem}", size, times)


def _report(title: str, size: float, times: dict[str, list[tuple[float, float]]]) -> Iterator[str]:
    speeds = {
        program: (
            statistics.median(size / cpu for cpu, _ in found),
            statistics.median(size / wall for _, wall in found),
        )
        for program, found in times.items()
    }
    peers = {program: speed[0] for program, speed in speeds.items() if program != "megallama"}
    best = max(peers, key=peers.__getitem__)
    shown = ", ".join(f"{p} {cpu:.2f} (clock {wall:.2f})" for p, (cpu, wall) in speeds.items())
    yield f"{title}, {size:.1f} MB: MB/s per core: {shown}"
    yield f"  ratio to {best}, the better: {speeds['megallama'][0] / peers[best]:.2f}"
