"""Several runs of one command line: one after another on the same ranks, or started by Hydra's launchers."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from megallama import entry
from megallama.cli import main
from megallama.commands.train import last_validation_loss
from megallama.config.load import load_config, load_yaml
from tests.launch.conftest import Workplace
from tests.launch.entry import torchrun, unchanged
from tests.support.jobs import metrics, overrides, run_job


def losses(run_dir: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of a run."""
    return [(line["train/loss"], line["train/grad_norm"]) for line in metrics(run_dir)]


@pytest.mark.long
def test_multirun_under_torchrun_trains_every_value(tmp_path: Path) -> None:
    """Each job has a folder of its own and is the run that it would be alone, bit for bit."""
    words = [word for word in overrides(tmp_path, run_name="sweep") if not word.startswith("optim.lr")]
    done = torchrun(["--multirun", *words, "optim.lr=1e-3,2e-3"], folder=tmp_path)
    assert done.returncode == 0, done.stdout
    for index, rate in enumerate((1e-3, 2e-3)):
        folder = tmp_path / "sweep" / str(index)
        config = load_yaml(folder / "config.yaml")
        assert (config.optim.lr, config.train.run_dir) == (rate, str(folder))
        alone = run_job(tmp_path, 2, f"optim.lr={rate}", run_name=f"alone{index}")
        assert len(alone) == 5 and losses(folder) == alone
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000005"]
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["0", "1"]
    first, second = losses(tmp_path / "sweep" / "0"), losses(tmp_path / "sweep" / "1")
    assert first[0] == second[0] and first[-1] != second[-1], "the same start, and another rate since"


def test_from_within_the_ranks_only_one_after_another(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under torchrun every rank reads the command: a launcher or sweeper would work once in each."""
    monkeypatch.chdir(workplace.folder)
    words = [*workplace.arguments, "optim.lr=1e-3,2e-3", "hydra/launcher=joblib", "hydra/sweeper=optuna"]
    with unchanged(workplace.folder):
        assert entry.main(["--multirun", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: 2 problems:"
    for line, plugin in zip(lines[1:], ("hydra/launcher=joblib", "hydra/sweeper=optuna"), strict=True):
        assert (
            line.startswith(f"  - {plugin} would change nothing here")
            and "megallama train --multirun" in line
        )


def start_nothing(module: str, words: list[str], *, options: tuple[str, ...], ranks_per_node: int) -> int:
    """In the place of `start_ranks`: the run of lr=2e-3 fails, and one of lr=3e-3 is ended by a signal."""
    config = load_config(words)
    Path(config.train.run_dir).mkdir(parents=True, exist_ok=True)
    line = '{"progress/step": 1, "eval/loss": 0.5}\n{"progress/step": 2}\n'
    (Path(config.train.run_dir) / "metrics.jsonl").write_text(line, encoding="utf-8")
    return {2e-3: 2, 3e-3: 143}.get(config.optim.lr, 0)


def test_what_a_sweep_gives_back(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace.folder)
    monkeypatch.setattr("megallama.host.torchrun.start_ranks", start_nothing)
    words = ["train", "--multirun", "--nproc-per-node", "1", *workplace.arguments]
    assert main([*words, "optim.lr=1e-3", "hydra.sweep.dir=good"]) == 0
    assert last_validation_loss(workplace.folder / "good" / "0") == 0.5
    loggers = {name: logging.getLogger(name) for name in list(logging.root.manager.loggerDict)}
    assert not [name for name, logger in loggers.items() if name.startswith("megallama") and logger.disabled]
    assert main([*words, "optim.lr=2e-3,1e-3", "hydra.sweep.dir=bad"]) == 2
    assert (workplace.folder / "bad" / "1").exists(), "Hydra's launcher goes on after a failure"
    with pytest.raises(SystemExit) as ended:
        main([*words, "optim.lr=3e-3,1e-3", "hydra.sweep.dir=ended"])
    assert ended.value.code == 143 and not (workplace.folder / "ended" / "1").exists()
    capsys.readouterr()
    # Nothing is started, or written, for what is known to be wrong before.
    optuna = ["optim.lr=interval(1e-4,1e-3)", "hydra/sweeper=optuna"]
    validated = [*optuna, "data.validation=[data/副本]", "hydra.sweep.dir=good"]
    for more, message in (
        (["optim.lr=1e-3,-1"], "optim.lr (-1.0) must be"),
        (optuna, "the run has no validation data"),
        (["train.seed=1,2", "hydra.sweep.subdir=same"], "runs 0 and 1 of the sweep would share "),
        (["--cfg", "job"], "--cfg shows one run: leave out --multirun"),
        (["+hydra.sweeper.params={optim.lr: 'interval(1,2)'}", *optuna], "the sweep cannot be composed"),
        (validated, f"{workplace.folder}/good/0 is there already"),
    ):
        with unchanged(workplace.folder):
            assert main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error, error
    # What a plugin raises is one message, too.
    assert main([*words, "hydra/launcher=joblib", "hydra.launcher.n_jobs=0", "hydra.sweep.dir=none"]) == 2
    assert "hydra/launcher=joblib or the sweeper cannot go on (ValueError: " in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_launcher_starts_runs_with_ranks_of_their_own(
    launcher: str, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace.folder)
    words = [*workplace.arguments, "optim.lr=1e-3,2e-3", f"hydra/launcher={launcher}", "train.steps=2"]
    assert main(["train", "--multirun", "--nproc-per-node", "2", *words]) == 0
    for index, rate in enumerate((1e-3, 2e-3)):
        folder = workplace.run_dir / str(index)
        assert load_yaml(folder / "config.yaml").optim.lr == rate
        assert len(metrics(folder)) == 2
        assert len(list((folder / "log").glob("rank-*.log"))) == 2
