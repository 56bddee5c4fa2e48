"""A job is checked by rank 0: the other ranks open none of the files that it looks into, and end with its message."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from megallama.config.load import load_config
from megallama.host.errors import EXIT_USER_ERROR, UserError
from megallama.host.launch import read_launch_environment
from tests.launch.conftest import Workplace
from tests.launch.entry import Outcome, call, impatient_train_command
from tests.support.ranks import run_ranks

RANKS = 3


def check(arguments: list[str], folder: str) -> tuple[set[str], str]:
    """One rank's check of a job: what it opened below `folder`, and the message."""
    from megallama import preflight
    from megallama.topology import rendezvous  # what it opens by being imported is no matter

    assert rendezvous
    opened: set[str] = set()

    def note(event: str, details: tuple[object, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir") and str(details[0]).startswith(folder):
            opened.add(os.path.relpath(str(details[0]), folder))

    config = load_config(arguments, working_dir=Path(folder))
    sys.addaudithook(note)
    message = ""
    try:
        preflight.check_job([config], environment=read_launch_environment(), job="0")
    except UserError as error:
        message = str(error)
    return opened, message


def test_only_rank_0_opens_files(workplace: Workplace) -> None:
    (opened, message), *others = run_ranks(
        RANKS, check, workplace_arguments(workplace), str(workplace.folder)
    )
    assert message == ""
    assert {"tokenizer/tokenizer.model", "data/train.idx", "data/train.json"} <= opened
    assert others == [(set(), "")] * (RANKS - 1)


def test_every_rank_ends_with_the_message_of_rank_0(workplace: Workplace) -> None:
    """What the settings alone show is known to all, and yet none leaves with a part of the problems."""
    (workplace.folder / "data" / "train.bin").write_bytes(b"")
    for extra in ([], ["optim.lr=-1"]):
        words = [*workplace_arguments(workplace), *extra]
        begun = time.monotonic()
        (opened, message), *others = run_ranks(RANKS, check, words, str(workplace.folder))
        assert "data/train.bin is truncated" in message and ("optim.lr (-1" in message) == bool(extra)
        assert opened and others == [(set(), message)] * (RANKS - 1)
        assert time.monotonic() - begun < 120, "nobody waited for a rank that had heard all"


def workplace_arguments(workplace: Workplace) -> list[str]:
    """A run that three ranks can share."""
    return [*workplace.arguments, "train.global_batch_size=6"]


def enter(arguments: list[str], folder: str) -> Outcome:
    """One rank through the real entry."""
    os.chdir(folder)
    return call(impatient_train_command, arguments)


def test_all_ranks_of_the_entry_end_with_one_message(workplace: Workplace) -> None:
    words = [*workplace_arguments(workplace), "data.tokenizer=other_tokenizer"]
    first, *others = run_ranks(RANKS, enter, words, str(workplace.folder))
    assert first.code == EXIT_USER_ERROR and "was made with another tokenizer" in first.message
    for rank, outcome in enumerate(others, start=1):
        assert outcome.code == EXIT_USER_ERROR
        assert outcome.output == f"error on rank {rank}: {first.message}\n"
    assert not any(outcome.had_process_group for outcome in (first, *others))


def check_twice(arguments: list[str], folder: str) -> list[str]:
    """The same name for two checks of the same processes, with a process group in between."""
    import torch.distributed as dist

    from megallama.topology.connect import connect

    config = load_config(arguments, working_dir=Path(folder))
    messages = [check(arguments, folder)[1]]
    with connect(config.parallel, environment=read_launch_environment(), job_index=0):
        dist.barrier()
    messages.append(check([*arguments, "data.sources=[absent]"], folder)[1])
    messages.append(check(arguments, folder)[1])
    with connect(config.parallel, environment=read_launch_environment(), job_index=0):
        dist.barrier()
    return messages


def test_a_check_is_not_answered_by_an_earlier_one(workplace: Workplace) -> None:
    for first, second, third in run_ranks(2, check_twice, workplace.arguments, str(workplace.folder)):
        assert first == third == "" and "absent does not exist" in second


def fail(folder: str) -> str:
    """Rank 0 meets an error that is nobody's mistake."""
    from megallama import preflight

    def broken(*arguments: object, **named: object) -> None:
        raise ZeroDivisionError("of the program")

    environment = read_launch_environment()
    if environment.rank == 0:
        preflight.check_runs = broken
    config = load_config(["+exp=demo"], working_dir=Path(folder))
    try:
        preflight.check_job([config], environment=environment, job="0")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_fault_of_rank_0_ends_the_others_too(tmp_path: Path) -> None:
    first, second = run_ranks(2, fail, str(tmp_path))
    assert first == "ZeroDivisionError: of the program"
    assert second == f"CheckpointError: {first}"
