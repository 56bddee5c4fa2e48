"""Prepared data cut into shards is one source, and the same source as without a cut."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.cli import main
from megallama.config.schema import DataConfig, ModelConfig, Packing, RunConfig, SourceConfig, TrainConfig
from megallama.stream.trace import trace_step
from megallama.tokens.manifest import check_token_file, read_manifest
from tests.support.builders import part_loader
from tests.support.jobs import SMALL, metrics, train
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def prepared(corpus: Path, tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus prepared as one file (`整`), in shards (`分`), and in smaller ones (`细`)."""
    folder = tmp_path_factory.mktemp("prepared")
    for name, extra in (("整", []), ("分", ["--shard-tokens", "3e3"]), ("细", ["--shard-tokens", "700"])):
        words = ["prepare", str(corpus), "--tokenizer", str(tokenizer_path), "--output", str(folder / name)]
        assert main([*words, "--workers", "1", "--validation-fraction", "0.2", *extra]) == 0
    assert (read_manifest(folder / "分" / "train") or pytest.fail()).shards > 2
    return folder


def config_of(prefix: Path, run_dir: Path, **data: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(vocab_size=500),
        train=TrainConfig(steps=40, run_dir=str(run_dir), seq_len=64, global_batch_size=4),
        data=DataConfig(sources=[SourceConfig(path=str(prefix), **data)]),
    )


@pytest.mark.parametrize("packing", list(Packing))
@pytest.mark.parametrize("name", ["分", "细"])
def test_shards_give_the_samples_of_one_file(
    prepared: Path, tmp_path: Path, packing: Packing, name: str
) -> None:
    both = []
    for kind in ("整", name):
        config = config_of(prepared / kind / "train", tmp_path / kind, validation_fraction=0.1)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, packing=packing))
        loader = part_loader(config, dp_rank=0, dp_size=1, num_micro_batches=1)
        steps = [loader.batches(step)[0] for step in range(40)]
        held_out = [batch for batches in loader.validation_batches() for batch in batches]
        ledger = loader.ledger(40)
        loader.close()
        (source,) = ledger["segments"][0].pop("sources")
        both.append((steps + held_out, ledger, {**source, "path": None}))
    (one, one_ledger, one_source), (cut, cut_ledger, cut_source) = both
    assert (one_ledger, one_source) == (cut_ledger, cut_source)
    assert len(one) == len(cut) > 40
    for a, b in zip(one, cut, strict=True):
        assert torch.equal(a.tokens_BS, b.tokens_BS) and torch.equal(a.labels_BS, b.labels_BS)
        assert a.document_starts == b.document_starts


def test_a_run_trains_on_shards_as_on_one_file(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, traced = [], []
    for kind in ("整", "分"):
        source = f"data.sources=[{{path: {prepared / kind / 'train'}}}]"
        extra = [
            "model.vocab_size=500",
            "model.num_layers=1",
            "train.steps=2",
            f"train.run_dir={tmp_path / kind}",
        ]
        run_ranks(1, train, [*SMALL, source, *extra])
        found.append([(line["train/loss"], line["train/grad_norm"]) for line in metrics(tmp_path / kind)])
        sequences = trace_step(tmp_path / kind, step=2)
        traced.append(
            [(s.sample, s.epoch, s.place, [(d.ids, d.origin) for d in s.documents]) for s in sequences]
        )
    assert found[0] == found[1] and len(found[0]) == 2
    assert traced[0] == traced[1]


def test_shards_of_before_they_had_a_common_identity_are_read_on(prepared: Path, tmp_path: Path) -> None:
    shards = [json.loads(path.read_text()) for path in sorted((prepared / "分").glob("train-*.json"))]
    path = prepared / "分" / "train.json"
    current = path.read_text(encoding="utf-8")
    older = json.loads(current)
    del older["parts_sha256"]
    for key in ("bin_sha256", "idx_sha256"):
        older[key] = hashlib.sha256(" ".join(shard[key] for shard in shards).encode()).hexdigest()
    try:
        path.write_text(json.dumps(older), encoding="utf-8")
        assert check_token_file(prepared / "分" / "train") == []
        loader = part_loader(
            config_of(prepared / "分" / "train", tmp_path), dp_rank=0, dp_size=1, num_micro_batches=1
        )
        assert len(loader.batches(0)) == 1
        loader.close()
        path.write_text(json.dumps({**older, "bin_sha256": "x"}), encoding="utf-8")
        assert "disagree" in " ".join(check_token_file(prepared / "分" / "train"))
    finally:
        path.write_text(current, encoding="utf-8")
