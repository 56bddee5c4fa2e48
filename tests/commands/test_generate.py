"""Sampling from a run folder, whatever layout it was trained in."""

import shutil

import pytest
import torch

from megallama.cli import main
from megallama.generate import Sampling, choose_token, continue_tokens, open_run
from tests.support.jobs import overrides, train, write_dataset
from tests.support.ranks import run_ranks

TEXT = "春天来了，花开了。\nfor i in range(10):\n    print(i)\n" * 60


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run over tp2 x pp2 with a tokenizer that knows some Chinese."""
    from megallama.prepare.run import prepare
    from megallama.tokenizers.training import train_tokenizer

    folder = tmp_path_factory.mktemp("generate")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    tokenizer = train_tokenizer([folder / "text.txt"], folder / "tokenizer", vocab_size=300)
    prepare([folder / "text.txt"], folder / "prepared", tokenizer=tokenizer, validation_fraction=0)
    arguments = [
        f"data.sources=[{{path: {folder / 'prepared' / 'train'}}}]",
        f"data.tokenizer={tokenizer}",
        "model.vocab_size=300",
        "parallel.tp=2",
        "parallel.pp=2",
        "train.steps=40",
        "optim.lr=1e-2",
    ]
    write_dataset(folder / "data" / "train")
    run_ranks(4, train, overrides(folder, *arguments))
    return folder / "run"


def output_of(capsys, *arguments):
    code = main(["generate", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_continues_the_prompt_with_what_it_learnt(run_dir, capsys):
    prompt = "春天来了，花开了。\n"
    code, out, _ = output_of(
        capsys, run_dir, "--prompt", prompt, "--temperature", "0", "--max-new-tokens", "40"
    )
    assert code == 0 and out.startswith(prompt + "for i in range(10):\n    print(i)\n春天来了，花开了。\n"), (
        out
    )


def test_the_same_seed_gives_the_same_text_and_another_seed_another(run_dir, capsys):
    texts = [
        output_of(capsys, run_dir, "--prompt", "for", "--temperature", "2.5", "--seed", seed)[1]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "--temperature (-1.0) must be 0 or more"),
        (["--top-p", "0"], "--top-p (0.0) must be in (0, 1]"),
        (["--max-new-tokens", "0"], "--max-new-tokens (0) must be at least 1: give how many"),
    ],
)
def test_senseless_sampling_is_refused(run_dir, capsys, arguments, message):
    code, out, err = output_of(capsys, run_dir, "--prompt", "a", *arguments)
    assert code == 2 and out == "" and message in err and "Traceback" not in err


def test_numbers_of_another_kind_are_refused(run_dir, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", str(run_dir), "--prompt", "a", "--top-k", "-3"])
    assert "--top-k: -3 must be a whole number, 0 at least" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    code, _, err = output_of(capsys, tmp_path, "--prompt", "a")
    assert code == 2 and "is not a run folder" in err


def test_choice_respects_temperature_top_k_and_top_p():
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0, -9.0])
    generator = torch.Generator().manual_seed(0)

    def drawn(**settings):
        return {choose_token(logits, Sampling(**settings), generator) for _ in range(300)}

    assert drawn(temperature=0) == {1}
    assert drawn(temperature=1, top_k=2) == {1, 2}
    assert drawn(temperature=1, top_p=0.5) == {1}
    assert drawn(temperature=1, top_p=0.8) == {1, 2}
    assert drawn(temperature=1) >= {0, 1, 2, 3}


@pytest.fixture(scope="module")
def imported(run_dir, tmp_path_factory):
    """The run's model, out to Hugging Face and in again."""
    folder = tmp_path_factory.mktemp("导入")
    assert main(["export", str(run_dir), "--output", str(folder / "hf")]) == 0
    assert main(["import", str(folder / "hf"), "--output", str(folder / "模型")]) == 0
    return folder / "模型"


def test_an_import_continues_a_prompt_as_the_run_does(run_dir, imported, capsys):
    for prompt in ("春天来了，花", "for i"):
        arguments = ["--prompt", prompt, "--temperature", "0", "--max-new-tokens", "20"]
        code, out, _ = output_of(capsys, imported, *arguments)
        assert (code, out) == (0, output_of(capsys, run_dir, *arguments)[1])
    with open_run(imported) as (config, _, tokenizer):
        assert (config.precision.dtype.value, config.model.name, tokenizer.vocab_size) == (
            "fp32",
            "模型",
            300,
        )


def test_an_import_of_low_precision_computes_in_it(run_dir, tmp_path, capsys):
    assert main(["export", str(run_dir), "--output", str(tmp_path / "hf"), "--dtype", "bf16"]) == 0
    assert main(["import", str(tmp_path / "hf"), "--output", str(tmp_path / "imported")]) == 0
    with open_run(tmp_path / "imported") as (config, stage, _):
        assert config.precision.dtype.value == "bf16"
        assert {parameter.dtype for parameter in stage.module.parameters()} == {torch.bfloat16}


def test_an_import_that_lacks_a_part_is_told_what_to_do(imported, tmp_path, capsys):
    shutil.copytree(imported, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "tokenizer")
    code, _, err = output_of(capsys, tmp_path / "copy", "--prompt", "a")
    assert (
        code == 2
        and f"copy the model's tokenizer.model or tokenizer.json to {tmp_path}/copy/tokenizer" in err
    )
    shutil.rmtree(tmp_path / "copy" / "conf")
    code, _, err = output_of(capsys, tmp_path / "copy", "--prompt", "a")
    assert code == 2 and "or a folder that `megallama import` made" in err


def test_ids_that_no_tokenizer_can_show_are_not_drawn(imported):
    with open_run(imported) as (config, stage, tokenizer):
        new = continue_tokens(
            config,
            stage,
            tokenizer.encode("春"),
            eod_id=-1,
            max_new_tokens=30,
            sampling=Sampling(temperature=100.0),
            vocab_size=40,
        )
        drawn = set(new)
    assert len(drawn) > 10 and max(drawn) < 40


def test_the_export_generates_the_same_in_transformers(run_dir, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(["export", str(run_dir), "--output", str(tmp_path / "hf")]) == 0
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    capsys.readouterr()
    for prompt in ("春天来了，花", "for i", "print(i)\n春"):
        text = output_of(capsys, run_dir, "--prompt", prompt, "--temperature", "0", "--max-new-tokens", "20")[
            1
        ]
        with open_run(run_dir) as (config, stage, ours):
            ids = ours.encode(prompt)
            new = continue_tokens(
                config, stage, ids, eod_id=ours.eod_id, max_new_tokens=20, sampling=Sampling(temperature=0)
            )
            wanted = ids + list(new)
        given = tokenizer(prompt, return_tensors="pt")
        assert given.input_ids[0].tolist() == ids, "another tokenizer"
        got = model.generate(**given, max_new_tokens=20, do_sample=False)[0].tolist()
        assert [token for token in got if token != ours.eod_id] == wanted
        assert tokenizer.decode(wanted) == text.removesuffix("\n")
