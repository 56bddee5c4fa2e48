"""The command: a table, a verdict, an exit code; and that it runs the largest experiment in small."""

from __future__ import annotations

from functools import partial

import pytest

from megallama.cli import main
from megallama.config.load import CONF_DIR
from megallama.verification.layouts import parse_layouts
from megallama.verification.verify import verify
from tests.layouts.matrix import base
from tests.mutations.planted import MUTATIONS


def test_the_largest_experiment_is_equal_and_says_so(capsys):
    assert (
        main(
            [
                "verify",
                "+exp=llama3_405b",
                "--steps",
                "2",
                "--layouts",
                "tp=2,sp=true;dp=2,zero=3",
                "--traffic",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert out.count(" equal (") == 2 and "all 2 layouts equal one process" in out
    assert "tp           all_gather      float64" in out


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_other_precisions_have_their_own_tolerances(dtype):
    layouts = parse_layouts("tp=2,sp=true;dp=2,zero=2")
    results = list(verify(base(), layouts, steps=3, dtype=dtype))
    assert all(result.is_equal for result in results), results
    assert max(result.errors["gradient"] for result in results) > 1e-9, "computed in fp64"


def test_fp64_errors_are_those_of_fp64():
    (result,) = verify(base(), parse_layouts("tp=2,sp=true"), steps=3)
    assert result.is_equal and max(result.errors.values()) < 1e-12, result


@pytest.mark.parametrize(
    ("bug", "layout", "words"),
    [
        ("norm_weights_are_not_summed_over_tp", "tp=2,sp=true", "sum over tp of norm weights is missing"),
        ("loss_is_averaged_over_dp_twice", "dp=2,zero=1", "1 / dp (2)"),
        ("replicated_parameters_count_on_every_tp_rank", "tp=2", "counted more than once"),
        ("gradients_are_left_over_on_a_later_stage", "pp=2,zero=1", "is not zero before the first backward"),
        ("zero_0_does_not_reduce", "dp=2,zero=0", "replicas (dp, cp) differ"),
        ("tied_copy_is_stale", "pp=2,ties=true,zero=1", "tied weight differs"),
    ],
)
def test_a_planted_bug_differs_and_its_cause_is_named(bug, layout, words):
    (result,) = verify(base(), parse_layouts(layout), steps=2, before=MUTATIONS[bug])
    assert not result.is_equal and words in result.cause, result


def test_the_exit_code_tells_a_difference(monkeypatch, capsys):
    import megallama.verification.verify as module

    bug = MUTATIONS["loss_is_averaged_over_dp_twice"]
    monkeypatch.setattr(module, "verify", partial(verify, before=bug))
    assert main(["verify", "+exp=llama2_7b", "--steps", "1", "--layouts", "dp=2"]) == 1
    out = capsys.readouterr().out
    assert "DIFFERS" in out and "1 of 1 layouts differ" in out


@pytest.mark.parametrize(
    "words",
    [
        ["--layouts", "tp=3"],
        ["--layouts", "tp"],
        ["--max-ranks", "4"],
    ],
)
def test_bad_input_is_refused_before_anything_runs(words, capsys):
    assert main(["verify", "+exp=llama2_7b", *words]) == 2
    assert "error:" in capsys.readouterr().err


def test_shapes_and_words_are_those_of_a_run(tmp_path, monkeypatch, capsys):
    """A shape of one's own, options among the words, several values."""
    import megallama.verification.verify as module

    seen = []
    monkeypatch.setattr(module, "verify", lambda config, layouts, **rest: seen.append(config) or iter(()))
    (tmp_path / "model").mkdir()
    shape = (CONF_DIR / "model" / "llama_tiny.yaml").read_text(encoding="utf-8")
    (tmp_path / "model" / "我的.yaml").write_text(shape.replace("llama_tiny", "我的"), encoding="utf-8")
    words = ["+exp=llama2_7b", "--config-dir", str(tmp_path), "model=我的", "--layouts", "dp=2", "-m"]
    main(["verify", *words, "train.seq_len=64,128", "optim.lr=1e-3"])
    assert [(config.model.name, config.train.seq_len) for config in seen] == [("我的", 64), ("我的", 128)]
