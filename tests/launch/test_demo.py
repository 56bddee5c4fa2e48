"""`make demo`, cut short: every command of it runs, one after the other, and leaves what it promises."""

import importlib.util
import os
from pathlib import Path

import pytest

from tests.support.jobs import metrics
from tests.support.places import ROOT


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_demo_goes_from_text_to_text(tmp_path, monkeypatch, capfd):
    spec = importlib.util.spec_from_file_location("demo", ROOT / "launch" / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    whole, command = demo.corpus(), demo.command

    def shortened(*words):
        command(
            *words,
            *(["train.steps=4", "optim.warmup_steps=1", "eval.interval=2"] if words[1] == "train" else []),
        )

    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(
        demo, "corpus", lambda: [path for path in whole if Path(path).name in ("email", "json")]
    )
    monkeypatch.setattr(demo, "command", shortened)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    assert demo.main() == 0
    shown = capfd.readouterr().out
    run = tmp_path / "runs" / "demo"
    assert [line["progress/step"] for line in metrics(run)] == [1, 2, 3, 4]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "[and 1 folders]" in shown and shown.count("json") < 4
    assert demo.PROMPT in shown and "guessing by frequency alone: " in shown
    assert "validation perplexity " in shown and "megallama check +exp=llama2_7b --world-size 64" in shown
    assert os.listdir(run / "checkpoints") == ["step-00000004"]

    assert demo.main() == 0, "again at once"
    assert len(metrics(run)) == 4
