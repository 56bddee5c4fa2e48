"""Sweeps and Hydra's own settings: what counts where, what is refused by name, and what a launcher's job gets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from megallama.config.load import load_config
from megallama.config.words.overrides import HydraUse
from megallama.config.words.sweep import load_sweep, run_sweep
from megallama.host.errors import ConfigError
from tests.config.runs import COMPLETE

WORDS = [*COMPLETE, "train.run_dir=runs/r"]


def test_the_run_folder_is_hydras() -> None:
    """hydra.run.dir is train.run_dir, unless it is given."""
    assert load_config(WORDS, working_dir=Path("/w")).train.run_dir == "/w/runs/r"
    for words in (COMPLETE, WORDS):
        config = load_config([*words, "hydra.run.dir='x/运行'"], working_dir=Path("/w"))
        assert config.train.run_dir == "/w/x/运行"


def test_jobs_have_folders_as_hydra_numbers_them() -> None:
    def folders(*more: str) -> list[str]:
        return [
            load_config(words, working_dir=Path("/w"), use=HydraUse.jobs, job=job).train.run_dir
            for job, words in enumerate(load_sweep([*WORDS, *more], use=HydraUse.jobs).jobs)
        ]

    assert folders("train.seed=1,2") == ["/w/runs/r/0", "/w/runs/r/1"]
    assert folders("train.seed=1,2", "hydra.sweep.dir=s") == ["/w/s/0", "/w/s/1"]
    assert folders("train.run_dir=a,b") == ["/w/a/0", "/w/b/1"]
    named = folders("train.seed=1,2", "hydra.sweep.subdir='seed ${train.seed}'")
    assert named == ["/w/runs/r/seed 1", "/w/runs/r/seed 2"]
    (config,) = [
        load_config(words, use=HydraUse.jobs, job=5)
        for words in load_sweep([*WORDS, "train.seed='${hydra.job.num}'"], use=HydraUse.jobs).jobs
    ]
    assert config.train.seed == 5


@pytest.mark.parametrize(
    "word",
    [
        "hydra.job.chdir=true",
        "hydra/launcher=joblib",
        "hydra/sweeper=optuna",
        "hydra.sweep.dir=s",
        "hydra.verbose=true",
    ],
)
def test_what_a_single_run_would_ignore_is_refused(word: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config([*WORDS, word, "train.stesp=1"])
    first, second = raised.value.problems
    assert first.startswith(f"{word} would change nothing here, for one run: ") and "--multirun" in first
    assert second == "train.stesp is not a setting: did you mean train.steps?", "with everything else"


def test_what_ranks_cannot_do_is_refused(tmp_path: Path) -> None:
    for word in (
        "hydra/launcher=joblib",
        "hydra/sweeper=optuna",
        "hydra.job.env_set={A: b}",
        "hydra.run.dir=s",
    ):
        with pytest.raises(
            ConfigError, match=f"^{word.split('=')[0]}.* on the same ranks: .*megallama train --multirun"
        ):
            load_sweep([*WORDS, word], use=HydraUse.jobs)
    assert load_sweep([*WORDS, "hydra/launcher=basic"], use=HydraUse.jobs).jobs
    # Not typed, but in a file of the user's own.
    (tmp_path / "exp").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /hydra/launcher: joblib\n"
    (tmp_path / "exp" / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="^hydra/launcher=joblib cannot start runs from within the ranks"):
        load_sweep([*WORDS, "exp=mine"], extra_conf_dir=tmp_path, use=HydraUse.jobs)
    assert load_sweep([*WORDS, "exp=mine"], extra_conf_dir=tmp_path).launcher == "joblib"


def test_a_sweep_is_known_before_it_starts() -> None:
    sweep = load_sweep([*WORDS, "optim.lr=1e-3,2e-3", "hydra/launcher=joblib"])
    assert (sweep.launcher, sweep.is_chosen, len(sweep.jobs)) == ("joblib", False, 2)
    chosen = load_sweep([*WORDS, "optim.lr=interval(1e-4,1e-3)", "train.seed=3,4", "hydra/sweeper=optuna"])
    assert chosen.is_chosen and len(chosen.jobs) == 1
    config = load_config(chosen.jobs[0], use=HydraUse.sweep)
    assert (config.optim.lr, config.train.seed) == (1e-4, 3)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("hydra/launcher=nope", "Could not find 'hydra/launcher/nope'"),
        ("hydra.run.dir=x", "set hydra.sweep.dir or train.run_dir"),
        ("hydra.job.chdir=true", "relative paths start at the folder of the command"),
        ("hydra.mode=RUN", "--multirun says it already"),
        ("optim.lr=interval(1e-4,1e-3)", "the sweep cannot be expanded"),
        ("train.stesp=1,2", "did you mean train.steps"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_message(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_sweep([*WORDS, word])


def test_a_launcher_that_would_start_a_run_several_times() -> None:
    words = [
        *WORDS,
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.tasks_per_node=8",
        "hydra.launcher.nodes=2",
    ]
    with pytest.raises(ConfigError) as raised:
        load_sweep(words)
    assert [problem.split(" would")[0] for problem in raised.value.problems] == [
        "hydra.launcher.nodes (2)",
        "hydra.launcher.tasks_per_node (8)",
    ]


@dataclass(frozen=True)
class NoteJob:
    """Writes down the run that it would do, and says how good it is."""

    file: Path

    def __call__(self, words: list[str]) -> float:
        config = load_config(words)
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps([config.optim.lr, config.train.run_dir]) + "\n")
        return abs(config.optim.lr - 2e-3)

    def runs(self) -> list[tuple[float, str]]:
        """All that were written, in order."""
        return [tuple(json.loads(line)) for line in self.file.read_text(encoding="utf-8").splitlines()]


def test_hydras_launcher_does_the_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With files of the user's own, which a job finds too."""
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "我的"
    (own / "exp").mkdir(parents=True)
    (own / "exp" / "mine.yaml").write_text(
        "# @package _global_\ntrain:\n  run_dir: '甲 b'\n", encoding="utf-8"
    )
    job = NoteJob(tmp_path / "noted")
    sweep = load_sweep([*COMPLETE, "exp=mine", "optim.lr=1e-3,2e-3"], extra_conf_dir=own)
    run_sweep(sweep, job)
    # The job does not name the folder again: it is among its words.
    assert job.runs() == [(1e-3, f"{tmp_path}/甲 b/0"), (2e-3, f"{tmp_path}/甲 b/1")]
    assert (tmp_path / "甲 b" / "multirun.yaml").is_file()


def test_optunas_sweeper_chooses_by_what_jobs_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = NoteJob(tmp_path / "noted")
    words = [
        "optim.lr=1e-3,2e-3",
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=6",
        "hydra/sweeper/sampler=grid",
    ]
    run_sweep(load_sweep([*WORDS, *words]), job)
    assert {rate for rate, _ in job.runs()} == {1e-3, 2e-3}
    results = yaml.safe_load((tmp_path / "runs/r/optimization_results.yaml").read_text(encoding="utf-8"))
    assert results["best_params"] == {"optim.lr": 2e-3} and results["best_value"] == 0


def test_what_a_job_raises_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def fail(words: list[str]) -> float:
        raise ConfigError(["no"])

    with pytest.raises(ConfigError, match="no"):
        run_sweep(load_sweep([*WORDS, "optim.lr=1e-3,2e-3"]), fail)
