"""What only rank 0 writes at the start of a run ends every rank with the same message when it cannot be written."""

from __future__ import annotations

from pathlib import Path

from megallama.host.errors import UserError
from tests.support.jobs import overrides, run_job, train, write_prepared
from tests.support.ranks import run_ranks


def refusal(arguments: list[str]) -> str:
    """What a rank is told."""
    try:
        train(arguments)
    except UserError as error:
        return str(error)
    return "no error"


def test_a_record_of_data_that_cannot_be_written_ends_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "run" / "data.json" / "taken").mkdir(parents=True)
    first, second = run_ranks(2, refusal, overrides(tmp_path, "model.num_layers=1"), timeout_s=120)
    assert first == second
    assert first.startswith(f"{tmp_path / 'run' / 'data.json'} cannot be written (Is a directory): free some")


def test_a_changed_byte_of_the_data_ends_all_ranks_before_the_first_step(tmp_path: Path) -> None:
    prefix = tmp_path / "数据" / "train"
    write_prepared(prefix)
    content = bytearray(prefix.with_suffix(".bin").read_bytes())
    content[2000] ^= 1
    prefix.with_suffix(".bin").write_bytes(content)
    changed = [f"data.sources=[{{path: {prefix}}}]", "model.num_layers=2"]
    first, second = run_ranks(
        2, refusal, overrides(tmp_path, *changed, "data.verify_checksums=true"), timeout_s=120
    )
    assert first == second
    assert first.startswith(f"{prefix}.bin is not what was prepared (sha256 ")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    content[2000] ^= 1
    prefix.with_suffix(".bin").write_bytes(content)
    assert len(run_job(tmp_path, 2, *changed, "parallel.pp=2", "data.verify_checksums=true")) == 5


def test_a_log_of_samples_that_cannot_be_continued_ends_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples.jsonl").write_text("无\n", encoding="utf-8")
    words = ["model.num_layers=1", "log.samples=true"]
    first, second = run_ranks(2, refusal, overrides(tmp_path, *words), timeout_s=120)
    assert first == second and first.startswith(f"{tmp_path / 'run' / 'samples.jsonl'} cannot be continued (")
