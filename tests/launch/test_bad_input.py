"""Bad input to the real entry: one message with the remedy, exit code 2, nothing written, no process group."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megallama.host.errors import EXIT_USER_ERROR
from tests.launch.conftest import VOCAB_SIZE, Workplace
from tests.launch.entry import (
    ENTRY,
    ROOT,
    Outcome,
    impatient_train_command,
    megallama_command,
    run_command,
    torchrun,
    train_command,
    unchanged,
)


def cut(name: str, *, keep: float) -> Callable[[Path], None]:
    """Keeps the first part of a file."""

    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return spoil


def overwrite(name: str, *, at: int, with_bytes: bytes) -> Callable[[Path], None]:
    """Changes bytes of a file."""

    def spoil(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[at : at + len(with_bytes)] = with_bytes
        (folder / name).write_bytes(content)

    return spoil


SETTINGS: dict[str, tuple[list[str], int, str]] = {
    "unknown key": (["optim.learning_rat=1"], 1, "optim.learning_rat is not a setting: optim has lr, "),
    "misspelt key": (["train.step=5"], 1, "train.steps"),
    "wrong type": (["train.steps=many"], 1, "train.steps ('many') has the wrong type: expected integer"),
    "wrong kind of number": (["train.steps=1.5"], 1, "train.steps (1.5) has the wrong type"),
    "no such choice": (["precision.dtype=fp8"], 1, "precision.dtype ('fp8') has the wrong type"),
    "world size": (["parallel.tp=2"], 3, "world_size (3) must be a multiple of tp x pp x cp (2 x 1 x 1 = 2)"),
    "heads over tp": (
        ["parallel.tp=3", "model.ffn_hidden_size=192", "model.vocab_multiple=384"],
        3,
        "model.num_heads (4) must be a multiple of parallel.tp (3): use parallel.tp=2 or 4",
    ),
    "layers over pp": (
        ["parallel.pp=3"],
        3,
        "model.num_layers (4) must be a multiple of parallel.pp (3): use another number of stages, or give the uneven"
        " split with parallel.layers_per_stage=[1,2,1]",
    ),
    "batch": (
        ["train.micro_batch_size=4", "train.global_batch_size=100"],
        8,
        "train.global_batch_size (100)",
    ),
    "uneven stages": (
        ["parallel.pp=2", "parallel.layers_per_stage=[1,2]"],
        2,
        "parallel.layers_per_stage ([1, 2]) must be parallel.pp x parallel.vp (2 x 1 = 2) numbers",
    ),
    "context parallel": (
        ["parallel.cp=2", "train.seq_len=30"],
        2,
        "train.seq_len (30) must be a multiple of ",
    ),
    "heads over ulysses": (
        ["parallel.cp=8", "parallel.cp_kind=ulysses"],
        8,
        "parallel.cp_kind",
    ),
    "interleaved pipeline": (["parallel.vp=2"], 1, "parallel.vp (2) needs parallel.pp (1) above 1"),
    "micro-batches of an interleaved pipeline": (
        ["parallel.pp=2", "parallel.vp=2", "train.global_batch_size=1"],
        2,
        "the interleaved pipeline needs at least as many micro-batches (1) as parallel.pp (2)",
    ),
    "offload of nothing": (
        ["zero.stage=0", "zero.offload=true"],
        1,
        "zero.offload (true) needs zero.stage (0)",
    ),
    "two sources with the same content": (
        ["data.sources=[data/train,data/副本]"],
        1,
        "data/副本 hold the same data: leave one out and give the other both weights",
    ),
    "source shorter than a sequence": (
        ["data.sources=[data/短]", "train.seq_len=512"],
        1,
        "data/短 is too short (101 tokens) for one sample of seq_len + 1 (513) tokens: prepare more text or",
    ),
    "validation data shorter than a sequence": (
        ["data.validation=[data/短]", "train.seq_len=512"],
        1,
        "data/短 is too short (101 tokens)",
    ),
    "scheduled data shorter than a sequence": (
        ["data.schedule=[{from_step: 2, sources: [data/短]}]", "data.packing=cut", "train.seq_len=128"],
        1,
        "data/短 is too short (101 tokens)",
    ),
    "epochs that run out": (
        ["data.sources=[{path: data/短, max_epochs: 2}]"],
        1,
        "the data runs out at step 1 of train.steps (4), where every source has had its max_epochs: raise these",
    ),
    "weight that is next to nothing": (
        ["data.sources=[data/train,{path: data/短, weight: 1e-6}]"],
        1,
        "data/短 (1e-06) is less than one sample in 65536: raise it",
    ),
    "nothing left to train on": (
        ["data.sources=[{path: data/短, validation_fraction: 0.99}]"],
        1,
        "leaves no document to train on: lower it",
    ),
    "end of documents unknown": (
        ["data.sources=[data/短]", "data.loss_on_eod=false"],
        1,
        "data.loss_on_eod (false) needs the manifest of data source ",
    ),
    "pattern without a parameter": (
        ["optim.partial_steps=2", "optim.partial_parameters=[decoder.layers.0.*,embeding.*]"],
        1,
        "optim.partial_parameters (embeding.*) matches no parameter of the model: use names such as decoder.layers.",
    ),
    "folder of token files": (["data.sources=[data]"], 1, "give the prefix of a pair in it, as "),
    "misspelt key of a source": (
        ["data.sources=[{path: data/train, wieght: 1}]"],
        1,
        "data.sources.0.wieght is not a setting: did you mean weight? it has path, weight, max_epochs, ",
    ),
    "no setting": (["=5"], 1, "override '=5' names no setting: write section.setting=value"),
    "number beyond 64 bits": (
        ["train.seed=99999999999999999999"],
        1,
        "train.seed (99999999999999999999) must fit",
    ),
    "configuration folder that is not there": (
        ["--config-dir=absent"],
        1,
        "--config-dir (absent) is not a folder: give",
    ),
    "configuration folder of something else": (
        ["--config-dir=corpus"],
        1,
        "--config-dir (corpus) has neither model/ nor exp/: give the folder in which",
    ),
    "missing data": (["data.sources=[data/absent]"], 1, "data/absent does not exist"),
    "missing tokenizer": (["data.tokenizer=absent.model"], 1, "absent.model does not exist"),
    "vocabulary of the model": (
        ["model.vocab_size=512"],
        1,
        f"model.vocab_size (512) must be the tokenizer's ({VOCAB_SIZE} in ",
    ),
    "another tokenizer than the data's": (
        ["data.tokenizer=other_tokenizer"],
        1,
        f"data/train was made with another tokenizer (sentencepiece-{VOCAB_SIZE})",
    ),
    "run folder below a file": (
        ["train.run_dir=corpus/文0.txt/run"],
        1,
        "文0.txt is a file; choose another train.run_dir",
    ),
    "run folder is a file": (["train.run_dir=corpus/文0.txt"], 1, "it is a file; choose another"),
}
"""Words added to a complete run, number of ranks, and what the message must hold."""

FLAGS = {
    "flag that does not exist": (["--steps=5"], "unrecognized arguments: --steps=5: --help shows"),
    "one job of several": (["--multirun", "optim.lr=1e-3,-1"], "optim.lr (-1.0) must be above 0"),
}

FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated .bin": (cut("data/train.bin", keep=0.5), "data/train.bin is truncated ("),
    "empty .bin": (cut("data/train.bin", keep=0), "data/train.bin is truncated (0 bytes"),
    "truncated .idx": (cut("data/train.idx", keep=0.5), "data/train.idx is damaged ("),
    "other .idx": (overwrite("data/train.idx", at=0, with_bytes=b"PK"), "data/train.idx is damaged (it does"),
    "counts in .idx": (overwrite("data/train.idx", at=18, with_bytes=b"\xff\xff"), "train.idx is damaged ("),
    "no .idx": (lambda folder: (folder / "data/train.idx").unlink(), "data/train does not exist (no .idx"),
    "truncated tokenizer": (cut("tokenizer/tokenizer.model", keep=0.3), "is not a readable sentencepiece"),
    "damaged manifest": (cut("data/train.json", keep=0.5), "manifest "),
}


def assert_refused(outcome: Outcome, expected: str) -> None:
    """Exit code 2 and one message, on one line, with a remedy."""
    assert outcome.code == EXIT_USER_ERROR, outcome
    assert expected in outcome.message, outcome.output
    assert "\n" not in outcome.message, outcome.output
    what, _, remedy = outcome.message.partition(": ")
    assert what and remedy.strip(), "it says what to change"
    assert not outcome.had_process_group


@pytest.mark.parametrize("case", SETTINGS)
def test_bad_settings(case: str, workplace: Workplace) -> None:
    extra, world_size, expected = SETTINGS[case]
    arguments = [*workplace.arguments, *extra]
    with unchanged(workplace.folder):
        outcome = run_command(
            impatient_train_command, arguments, folder=workplace.folder, world_size=world_size
        )
        check = ["check", f"--world-size={world_size}", *arguments]
        checked = run_command(megallama_command, check, folder=workplace.folder)
    assert_refused(outcome, expected)
    assert (checked.code, checked.output) == (outcome.code, outcome.output)


@pytest.mark.parametrize("case", FLAGS)
def test_bad_flags(case: str, workplace: Workplace) -> None:
    extra, expected = FLAGS[case]
    with unchanged(workplace.folder):
        outcome = run_command(train_command, [*workplace.arguments, *extra], folder=workplace.folder)
    assert_refused(outcome, expected)


@pytest.mark.parametrize("world_size", ["0", "-2"])
def test_a_world_without_ranks(world_size: str, workplace: Workplace) -> None:
    words = ["check", *workplace.arguments, f"--world-size={world_size}"]
    with unchanged(workplace.folder):
        outcome = run_command(megallama_command, words, folder=workplace.folder)
    assert outcome.code == EXIT_USER_ERROR
    assert f"--world-size: {world_size} must be a whole number, 1 at least" in outcome.output


def test_check_takes_the_words_of_the_entry_in_any_order(workplace: Workplace) -> None:
    (workplace.folder / "conf" / "model").mkdir(parents=True)
    shape = (ROOT / "conf" / "model" / "llama_tiny.yaml").read_text(encoding="utf-8")
    (workplace.folder / "conf" / "model" / "我的.yaml").write_text(
        shape.replace("llama_tiny", "我的"), encoding="utf-8"
    )
    first, *rest = workplace.arguments
    words = ["check", first, "--world-size", "1", *rest, "--multirun", "optim.lr=1e-3,2e-3", "-cd", "conf"]
    words += ["model=我的,llama_tiny", "train.steps=3"]
    words.remove(first)
    with unchanged(workplace.folder):
        outcome = run_command(megallama_command, words, folder=workplace.folder)
        refused = run_command(megallama_command, [*words, "zero.stage=1,7"], folder=workplace.folder)
        unknown = run_command(megallama_command, [*words, "--steps=1"], folder=workplace.folder)
    assert outcome.code == 0, outcome.output
    assert [line.split(",")[0] for line in outcome.output.splitlines()] == ["ok: 我的", "ok: llama_tiny"] * 2
    assert refused.code == EXIT_USER_ERROR and refused.message.startswith("zero.stage (7) must be"), refused
    assert unknown.code == EXIT_USER_ERROR and "unrecognized arguments: --steps=1" in unknown.output


@pytest.mark.parametrize("case", FILES)
def test_damaged_files(case: str, workplace: Workplace) -> None:
    spoil, expected = FILES[case]
    spoil(workplace.folder)
    with unchanged(workplace.folder):
        outcome = run_command(train_command, workplace.arguments, folder=workplace.folder)
    assert_refused(outcome, expected)


def test_what_data_lacks_is_told_at_once(workplace: Workplace) -> None:
    wrong = ["data.sources=[data/train,data/副本,{path: data/短, weight: 1e-6}]", "data.validation=[data/短]"]
    wrong += ["train.seq_len=128", "optim.partial_steps=1", "optim.partial_parameters=[x]", "zero.stage=7"]
    with unchanged(workplace.folder):
        outcome = run_command(train_command, [*workplace.arguments, *wrong], folder=workplace.folder)
    assert outcome.code == EXIT_USER_ERROR and not outcome.had_process_group
    head, *problems = outcome.message.splitlines()
    assert head == f"{len(problems)} problems:" and len(problems) == 4, outcome.output
    for part in ("hold the same data", "too short", "partial_parameters (x)", "zero.stage (7)"):
        assert sum(part in problem for problem in problems) == 1, (part, problems)


def test_several_problems_are_reported_at_once(workplace: Workplace) -> None:
    wrong = ["parallel.tp=3", "train.steps=0", "optim.lr=-1", "data.sources=[data/absent]", "zero.stage=7"]
    (workplace.folder / "tokenizer" / "tokenizer.model").unlink()
    with unchanged(workplace.folder):
        outcome = run_command(train_command, [*workplace.arguments, *wrong], folder=workplace.folder)
    assert outcome.code == EXIT_USER_ERROR and not outcome.had_process_group
    head, *problems = outcome.message.splitlines()
    assert head == f"{len(problems)} problems:"
    for part in ("train.steps (0)", "optim.lr (-1", "data/absent", "zero.stage (7)", "tokenizer folder"):
        assert sum(part in problem for problem in problems) == 1, (part, problems)
    several_keys = ["optim.learning_rat=1", "train.steps=many", "modle=llama_tiny"]
    outcome = run_command(train_command, [*workplace.arguments, *several_keys], folder=workplace.folder)
    head, *problems = outcome.message.splitlines()
    assert head == f"{len(problems)} problems:" and len(problems) == len(several_keys), outcome.output


def test_a_run_folder_that_the_kernel_refuses(workplace: Workplace) -> None:
    """Permission bits do not stop root, who only learns of it when the folder is made."""
    arguments = [*workplace.arguments, "train.run_dir=/proc/megallama/run"]
    with unchanged(workplace.folder):
        outcome = run_command(train_command, arguments, folder=workplace.folder)
    assert outcome.code == EXIT_USER_ERROR
    assert outcome.message.startswith("train.run_dir (/proc/megallama/run) cannot be written")
    assert outcome.message.endswith("choose another train.run_dir"), outcome.output


def test_a_run_folder_of_another_model(workplace: Workplace) -> None:
    train = [*workplace.arguments, "train.steps=1"]
    outcome = run_command(train_command, train, folder=workplace.folder)
    assert outcome.code == 0, outcome.output
    arguments = [*workplace.arguments, "model.ffn_hidden_size=96"]
    with unchanged(workplace.folder):
        outcome = run_command(train_command, arguments, folder=workplace.folder)
    assert_refused(outcome, "holds checkpoints of another model (model.ffn_hidden_size 192 there, 96 here)")
    on = [*workplace.arguments, "train.steps=2", "model.hidden_dropout=0.1", "model.max_seq_len=1024"]
    outcome = run_command(train_command, on, folder=workplace.folder)
    assert outcome.code == 0, "what is no part of the shape may change: " + outcome.output
    assert (workplace.run_dir / "checkpoints" / "step-00000002").is_dir()


def test_a_rank_that_alone_meets_an_error_speaks(workplace: Workplace) -> None:
    arguments = [*workplace.arguments, "parallel.tp=4"]
    outcome = run_command(impatient_train_command, arguments, folder=workplace.folder, world_size=2, rank=1)
    assert outcome.code == EXIT_USER_ERROR
    assert outcome.output.startswith("error on rank 1: world_size (2) must be"), outcome.output


def test_under_torchrun_only_rank_0_speaks(workplace: Workplace) -> None:
    with unchanged(workplace.folder):
        done = torchrun([*workplace.arguments, "parallel.tp=4"], folder=workplace.folder)
    spoken = [line for line in done.stdout.splitlines() if line.startswith("error")]
    assert done.returncode != 0
    assert len(spoken) == 1 and spoken[0].startswith("error: world_size (2) must be a multiple of"), spoken
    frames = [line for line in done.stdout.splitlines() if line.strip().startswith("File ")]
    ours = [line for line in frames if str(ENTRY) in line or str(ROOT / "megallama") in line]
    assert not ours, "torchrun may show its own traceback, we show none"
    assert "exitcode  : 2" in done.stdout, done.stdout


def test_a_bad_setting_is_noticed_before_torch_is_imported(workplace: Workplace) -> None:
    command = [sys.executable, "-X", "importtime", str(ENTRY), *workplace.arguments, "data.sources=[absent]"]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    with unchanged(workplace.folder):
        done = subprocess.run(
            command, cwd=workplace.folder, env=environment, capture_output=True, text=True, check=False
        )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert done.returncode == EXIT_USER_ERROR and "megallama.preflight" in imported, done.stderr
    assert not imported & {"torch", "megatron", "deepspeed", "transformers"}
