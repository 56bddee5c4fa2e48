"""The commands before and after a run, given what they cannot use: one message, exit code 2, nothing left behind."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from megallama.host.errors import EXIT_USER_ERROR
from tests.launch.conftest import Workplace
from tests.launch.entry import Outcome, megallama_command, run_command, unchanged

TEXT = "模型 reads text\n".encode()


def write(folder: Path, name: str, content: bytes) -> None:
    """A file of a corpus."""
    path = folder / "bad" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


CORPORA: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "no text at all": (
        lambda folder: write(folder, "空.txt", b""),
        [],
        "the corpus is empty (1 files without any text): give files that hold text",
    ),
    "only blank lines": (
        lambda folder: write(folder, "blank.txt", b"\n \n"),
        ["--documents=blank_line"],
        "the corpus is empty (1 files without any text)",
    ),
    "folder without text files": (
        lambda folder: write(folder, "picture.png", b"PNG"),
        [],
        "input bad matches no file with suffix",
    ),
    "no such folder": (lambda folder: None, [], "input bad does not exist"),
    "not UTF-8": (
        lambda folder: write(folder, "b.txt", TEXT + "词".encode("gbk")),
        [],
        f"file bad/b.txt is not UTF-8 (byte 0xb4 at offset {len(TEXT)})",
    ),
    "JSON that is none": (
        lambda folder: write(folder, "c.jsonl", b'{"text": "a"}\n\n{"text": \n'),
        [],
        "bad/c.jsonl line 3 is not JSON (",
    ),
    "gzip cut short": (
        lambda folder: write(folder, "e.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999)[:-9]),
        [],
        "file bad/e.jsonl.gz is damaged (",
    ),
    "zstd cut short": (
        lambda folder: write(folder, "f.txt.zst", zstandard.compress(TEXT * 999)[:-9]),
        [],
        "file bad/f.txt.zst is damaged (it ends in the middle of a frame): copy it again or leave it out",
    ),
    "Parquet that is none": (
        lambda folder: write(folder, "g.parquet", TEXT),
        [],
        "file bad/g.parquet is not a valid Parquet file (",
    ),
    "JSON without text": (
        lambda folder: write(folder, "d.jsonl", b'{"content": "a"}\n'),
        [],
        "bad/d.jsonl line 1 has no text in field 'text' (it has content)",
    ),
}
"""How the folder bad/ is made, further options, and what the message must hold."""

COMMANDS = {
    "prepare": ["prepare", "bad", "--tokenizer=tokenizer", "--output=out", "--workers=1"],
    "tokenizer train": ["tokenizer", "train", "bad", "--output=out", "--vocab-size=384"],
}


def assert_refused(outcome: Outcome, expected: str) -> None:
    """Exit code 2 and one message on one line."""
    assert outcome.code == EXIT_USER_ERROR, outcome
    assert expected in outcome.message, outcome.output
    assert "\n" not in outcome.message, outcome.output


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", CORPORA)
def test_a_corpus_that_cannot_be_used(case: str, command: str, workplace: Workplace) -> None:
    make, options, expected = CORPORA[case]
    make(workplace.folder)
    with unchanged(workplace.folder, allows_temporary=True):
        outcome = run_command(megallama_command, [*COMMANDS[command], *options], folder=workplace.folder)
    assert_refused(outcome, expected)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_existing_output_folder_stays_as_it_is(command: str, workplace: Workplace) -> None:
    write(workplace.folder, "b.txt", b"\xff")
    out = workplace.folder / "out"
    out.mkdir()
    (out / "kept.txt").write_text("mine")
    with unchanged(workplace.folder, allows_temporary=True):
        outcome = run_command(megallama_command, COMMANDS[command], folder=workplace.folder)
    assert_refused(outcome, "file bad/b.txt is not UTF-8 (byte 0xff at offset 0)")


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_folder_below_a_file(command: str, workplace: Workplace) -> None:
    write(workplace.folder, "a.txt", TEXT * 400)
    arguments = [
        word.replace("bad", "corpus").replace("=out", "=bad/a.txt/out") for word in COMMANDS[command]
    ]
    with unchanged(workplace.folder):
        outcome = run_command(megallama_command, arguments, folder=workplace.folder)
    assert_refused(outcome, "cannot be written (Not a directory): choose another folder")


def started_run(folder: Path) -> None:
    """A run folder as it is before the first step."""
    from megallama.config.load import load_config, to_yaml
    from megallama.trainer.run_folder import RunFolder

    config = load_config(Workplace(folder).arguments, working_dir=folder)
    RunFolder(folder / "runs" / "one").write_start(
        config_yaml=to_yaml(config), tokenizer=folder / "tokenizer"
    )


RUNS: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "generate without a folder": (
        lambda folder: None,
        ["generate", "runs/one", "--prompt=def"],
        "runs/one is not a run folder (no config.yaml): give the train.run_dir of a run",
    ),
    "generate from another folder": (
        lambda folder: None,
        ["generate", "corpus", "--prompt=def"],
        "corpus is not a run folder (no config.yaml)",
    ),
    "generate without a checkpoint": (
        started_run,
        ["generate", "runs/one", "--prompt=def"],
        "runs/one/checkpoints holds no usable checkpoint: train for at least one checkpoint.interval",
    ),
    "plot without a folder": (
        lambda folder: None,
        ["plot", "runs/one"],
        "no training loss to plot (runs/one/",
    ),
    "plot before the first step": (started_run, ["plot", "runs/one"], "no training loss to plot (runs/one/"),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_folder_that_is_no_run_yet(case: str, workplace: Workplace) -> None:
    make, arguments, expected = RUNS[case]
    make(workplace.folder)
    with unchanged(workplace.folder):
        outcome = run_command(megallama_command, arguments, folder=workplace.folder)
    assert_refused(outcome, expected)
