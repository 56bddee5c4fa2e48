"""From a step back to the text: what `megallama data trace` says is what the loader gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megallama.cli import main
from megallama.config.schema import DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig
from megallama.host.errors import UserError
from megallama.prepare.run import prepare
from megallama.stream.loader import DataLoader
from megallama.stream.trace import trace_step
from megallama.tokenizers.load import Tokenizer
from megallama.trainer.run_folder import RunFolder
from tests.support.builders import part_loader
from tests.support.corpus import write_corpus


@pytest.fixture
def run(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> tuple[Path, DataLoader]:
    """A run over two sources that stands at its first step, and its loader."""
    other = write_corpus(tmp_path / "other", files=20, seed=500)
    sources = []
    for name, texts in (("甲", corpus), ("乙", other)):
        report = prepare([texts], tmp_path / name, tokenizer=tokenizer.path, workers=1)
        sources.append(SourceConfig(path=str(report.train.prefix), weight=1.0 + len(sources)))
    folder = RunFolder(tmp_path / "run")
    config = RunConfig(
        model=ModelConfig(vocab_size=500),
        train=TrainConfig(steps=9, run_dir=str(folder.path), seq_len=64, global_batch_size=6),
        data=DataConfig(sources=sources, tokenizer=str(tokenizer.path)),
    )
    folder.write_start(config_yaml="", tokenizer=tokenizer.path)
    loader = part_loader(config, dp_rank=0, dp_size=1, num_micro_batches=1)
    folder.write_ledger(loader.ledger(0))
    return folder.path, loader


def test_it_names_what_the_step_was_trained_on(
    run: tuple[Path, DataLoader], tokenizer: Tokenizer, corpus: Path, tmp_path: Path
) -> None:
    folder, loader = run
    raw = {"甲": corpus, "乙": tmp_path / "other"}
    (batch,) = loader.batches(4)
    sequences = list(trace_step(folder, step=5))
    assert [sequence.sample for sequence in sequences] == list(range(24, 30))
    assert {Path(sequence.source).parent.name for sequence in sequences} == {"甲", "乙"}
    for row, sequence in enumerate(sequences):
        tokens = [*batch.tokens_BS[row].tolist(), int(batch.labels_BS[row, -1])]
        starts = [part.position for part in sequence.documents]
        assert tuple(s for s in starts if s < 64) == batch.document_starts[row]
        assert sum(part.tokens for part in sequence.documents) == 65
        for part in sequence.documents:
            held = tokens[part.position : part.position + part.tokens]
            assert part.ids == tuple(held[:8])
            assert part.origin is not None
            file = raw[Path(sequence.source).parent.name] / part.origin
            assert part.text is not None and part.text in tokenizer.decode(held)
            assert part.text.strip("</s>") in file.read_text(encoding="utf-8")
            assert part.text == tokenizer.decode(held).strip("\N{REPLACEMENT CHARACTER}")[:60]
    loader.close()


def test_the_command_prints_chinese_and_json(
    run: tuple[Path, DataLoader], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, loader = run
    loader.close()
    assert main(["data", "trace", str(folder), "--step", "1"]) == 0
    shown = capsys.readouterr().out
    assert "语言模型" in shown and "\\n" in shown and shown.count("row ") == 6
    assert main(["data", "trace", str(folder), "--step", "1", "--row", "3", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["row"] == 3 and "\\u" not in line


def test_a_run_without_tokenizer_shows_ids(
    run: tuple[Path, DataLoader], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, loader = run
    loader.close()
    (folder / "tokenizer" / "tokenizer.model").unlink()
    (folder / "tokenizer").rmdir()
    assert main(["data", "trace", str(folder), "--step", "1", "--row", "0"]) == 0
    assert "\n         ids " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 0}, r"step \(0\) must be at least 1"),
        ({"step": 1, "rows": range(6, 7)}, r"rows 6 to 6 are not all in the batch of step 1 \(6 sequences\)"),
    ],
)
def test_places_that_are_not_in_the_run(run: tuple[Path, DataLoader], options: Any, message: str) -> None:
    folder, loader = run
    loader.close()
    with pytest.raises(UserError, match=message):
        list(trace_step(folder, **options))


def test_data_that_is_no_more_what_it_was(
    run: tuple[Path, DataLoader], corpus: Path, tokenizer: Tokenizer
) -> None:
    folder, loader = run
    loader.close()
    prepare([corpus], folder.parent / "乙", tokenizer=tokenizer.path, workers=1, seed=9, overwrite=True)
    with pytest.raises(UserError, match="乙/train has changed since the run was trained on it"):
        list(trace_step(folder, step=1))


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.json does not exist: give the folder of a run"):
        list(trace_step(tmp_path, step=1))
    (tmp_path / "data.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        list(trace_step(tmp_path, step=1))
