"""Every rank of every layout gets its part of the same samples: the real loader on real process groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megallama.kernels.attention.zigzag import take_shard
from tests.support.jobs import overrides, write_dataset
from tests.support.ranks import run_ranks

STEPS = (0, 1, 7, 60)

LAYOUTS = {
    1: {"one rank": [], "micro-batch of 4": ["train.micro_batch_size=4"]},
    2: {
        "dp2": [],
        "tp2": ["parallel.tp=2", "parallel.sequence_parallel=true"],
        "pp2": ["parallel.pp=2"],
        "cp2": ["parallel.cp=2", "train.micro_batch_size=2"],
    },
    8: {
        "cp2 pp2 dp2": ["parallel.cp=2", "parallel.pp=2"],
        "cp2 pp4": ["parallel.cp=2", "parallel.pp=4"],
        "tp2 pp2 dp2": ["parallel.tp=2", "parallel.pp=2", "train.micro_batch_size=2"],
        "tp2 cp2 dp2": ["parallel.tp=2", "parallel.cp=2"],
    },
}


def read(jobs: list[list[str]]) -> list[dict[str, Any]]:
    """What the loader of this rank gives under each layout, and where in the layout the rank stands."""
    from megallama.config.load import load_config
    from megallama.host.launch import read_launch_environment
    from megallama.topology.connect import connect
    from tests.support.builders import loader_of

    found, environment = [], read_launch_environment()
    for index, arguments in enumerate(jobs):
        config = load_config(arguments)
        with connect(config.parallel, environment=environment, job_index=index) as topology:
            loader = loader_of(config, topology)
            steps = []
            for step in STEPS:
                batches = loader.batches(step)
                steps.append(
                    {
                        "ids": loader.sample_ids(step),
                        "tokens": torch.cat([batch.tokens_BS for batch in batches]).tolist(),
                        "labels": torch.cat([batch.labels_BS for batch in batches]).tolist(),
                        "mask": torch.cat([batch.loss_mask_BS for batch in batches]).tolist(),
                        "documents": [starts for batch in batches for starts in batch.document_starts],
                        "sizes": {len(batch.document_starts) for batch in batches},
                    }
                )
            loader.close()
            is_end = topology.is_first_stage or topology.is_last_stage
            place = (topology.dp_rank, topology.grid.dp, topology.cp_rank, topology.grid.cp, is_end)
            found.append({"place": place, "steps": steps, "micro": config.train.micro_batch_size})
    return found


def test_every_rank_of_every_layout_has_its_part_of_the_same_samples(tmp_path: Path) -> None:
    write_dataset(tmp_path / "数据" / "小", documents=6, seed=1)
    write_dataset(tmp_path / "数据" / "大", documents=60, seed=2)
    sources = f"data.sources=[{{path: {tmp_path}/数据/大, weight: 2}}, {{path: {tmp_path}/数据/小}}]"
    extra = [sources, "data.loss_after_eod=false", "train.steps=100", "model.num_layers=4"]
    results = {
        size: run_ranks(size, read, [overrides(tmp_path, *extra, *words) for words in layouts.values()])
        for size, layouts in LAYOUTS.items()
    }
    whole = results[1][0][0]["steps"]
    assert len({tuple(row) for step in whole for row in step["tokens"]}) > 24, "steps must differ"
    places = set()
    for size, layouts in LAYOUTS.items():
        for number, name in enumerate(layouts):
            for rank in results[size]:
                places.add(rank[number]["place"])
                check_rank(rank[number], whole, name)
    assert {place[0] for place in places} == {0, 1} == {place[2] for place in places}


def check_rank(rank: dict[str, Any], whole: list[dict[str, Any]], name: str) -> None:
    """That a rank has its share of the rows, its part of the sequences, and the ids of all."""
    dp_rank, dp, cp_rank, cp, is_end = rank["place"]
    for own, all_of in zip(rank["steps"], whole, strict=True):
        assert own["ids"] == all_of["ids"] and len(own["ids"]["samples"]) == 8, name
        share = 8 // dp
        rows = slice(dp_rank * share, (dp_rank + 1) * share)
        assert own["documents"] == all_of["documents"][rows], (name, rank["place"])
        assert own["sizes"] == {rank["micro"]}
        for key in ("tokens", "labels", "mask"):
            expected = take_shard(
                torch.tensor(all_of[key][rows]), dim=1, cp_size=cp, cp_rank=cp_rank
            ).tolist()
            assert own[key] == (expected if is_end else [[]] * share), (name, rank["place"], key)
