"""What only rank 0 writes at the start of a run ends every rank with the same message when it cannot be written."""

from __future__ import annotations

from pathlib import Path

from megallama.host.errors import UserError
from tests.jobs import overrides, train
from tests.ranks import run_ranks


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
