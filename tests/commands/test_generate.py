"""Generation from a run folder, whatever layout it was trained in."""

import dataclasses
import shutil
from types import SimpleNamespace

import pytest
import torch

from megallama.cli import main
from megallama.config.load import load_yaml
from megallama.config.schema import ParallelConfig, ZeroConfig
from megallama.generate import Sampling, generate, open_generator
from megallama.host.errors import UserError
from megallama.tokenizers.load import load_tokenizer
from tests.support.forward import greedy_tokens
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
        output_of(
            capsys,
            run_dir,
            "--prompt",
            "for",
            "--temperature",
            "2.5",
            "--max-new-tokens",
            "12",
            "--seed",
            seed,
        )[1]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "--temperature (-1.0) must be 0 or more"),
        (["--temperature", "1e-40"], "--temperature (1e-40) must be 0, or 1e-06 at least"),
        (["--top-p", "0"], "--top-p (0.0) must be in (0, 1]"),
        (["--repetition-penalty", "0"], "--repetition-penalty (0.0) must be above 0"),
        (["--beams", "2", "--temperature", "1"], "--beams (2) looks for the likeliest text"),
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


def test_choice_respects_temperature_top_k_top_p_and_repetition(run_dir):
    generator = open_generator(run_dir)
    ids = generator.tokenizer.encode("春天来了，花")

    def drawn(**settings):
        return {
            tuple(generator.continue_ids(ids, max_new_tokens=2, sampling=Sampling(seed=seed, **settings)))
            for seed in range(8)
        }

    likeliest = tuple(generator.continue_ids(ids, max_new_tokens=2, sampling=Sampling(temperature=0)))
    assert drawn(temperature=5, top_k=1) == drawn(temperature=5, top_p=1e-6) == {likeliest}
    assert len(drawn(temperature=5, top_k=2)) in (2, 3, 4)
    assert len(drawn(temperature=5)) > 4
    twice = Sampling(temperature=0, repetition_penalty=1e6)
    new = generator.continue_ids(ids, max_new_tokens=6, sampling=twice)
    assert len({*ids, *new}) == len({*ids}) + len(new), "a token came again"
    with torch.no_grad():
        next(generator.network.parameters()).fill_(float("nan"))
    for sampling in (Sampling(), Sampling(temperature=0), Sampling(temperature=0, beams=2)):
        with pytest.raises(UserError, match="logits after .* tokens are not finite"):
            generator.continue_ids(ids, max_new_tokens=2, sampling=sampling)


def test_beam_search_finds_a_likelier_text(run_dir, capsys):
    generator = open_generator(run_dir)
    ids = generator.tokenizer.encode("a")

    def log_probability(**settings):
        new = generator.continue_ids(ids, max_new_tokens=6, sampling=Sampling(temperature=0, **settings))
        assert len(new) == 6
        logits = generator.network(torch.tensor([ids + new])).logits[0, len(ids) - 1 : -1]
        return float(logits.detach().log_softmax(-1).gather(1, torch.tensor(new)[:, None]).sum())

    assert log_probability(beams=4) >= log_probability() - 1e-4
    code, out, _ = output_of(capsys, run_dir, "--prompt", "for", "--beams", "3", "--max-new-tokens", "8")
    assert code == 0 and out.startswith("for") and len(out) > 6


@pytest.mark.parametrize("beams", [1, 2])
def test_the_parts_shown_are_the_text_and_nothing_is_withheld(run_dir, monkeypatch, beams):
    """The last token may hold a whole character and the beginning of another: both are shown."""
    generator = open_generator(run_dir)
    tokens = ["<0xE8>", "<0x8A>", "<0xB1>", "天", "<0xE5>", "<0xBC>"]
    ids = [generator.tokenizer._processor.piece_to_id(token) for token in tokens]

    def give(self, prompt, *, show, **_):
        for token in ids:
            show(token)
        return ids

    monkeypatch.setattr("megallama.generate.Generator.continue_ids", give)
    parts = []
    text = generate(run_dir, "春", sampling=Sampling(temperature=0, beams=beams), show=parts.append)
    assert text == "".join(parts) == "花天" + generator.tokenizer.decode(ids[4:])
    assert parts[:3] == ["", "花", "天"] and "\ufffd" not in "".join(parts[:-1])


def test_a_begin_token_as_the_files_say_or_the_user(run_dir, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    prompts = []
    monkeypatch.setattr(
        "megallama.generate.Generator.continue_ids", lambda self, ids, **_: prompts.append(ids) or []
    )
    for begin in ("tokenizer", "always", "never"):
        generate(run, "for", begin=begin)
    (run / "tokenizer" / "tokenizer_config.json").write_text('{"add_bos_token": true}', encoding="utf-8")
    generate(run, "for", begin="tokenizer")
    generate(run, "for")  # as the data, which have none
    generate(run, "", begin="never")
    plain = load_tokenizer(run / "tokenizer").encode("for")
    assert prompts == [plain, [1, *plain], plain, [1, *plain], plain, [2]]


def test_end_tokens_of_an_imported_chat_model_end_the_text(imported, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(imported, run)
    assert open_generator(run).end_ids == (2,)
    kept = run / "huggingface" / "generation_config.json"
    kept.write_text('{"eos_token_id": [2, 7]}', encoding="utf-8")
    assert open_generator(run).end_ids == (2, 7)


def test_a_long_text_goes_on_beyond_a_training_sequence(run_dir, capsys, caplog):
    code, out, _ = output_of(
        capsys, run_dir, "--prompt", "春天" * 9, "--temperature", "0", "--max-new-tokens", "30"
    )
    assert code == 0 and len(out) > 30
    assert "are more than the 32 of a training sequence" in caplog.text


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
    generator = open_generator(imported)
    assert (generator.network.dtype, generator.model.name, generator.tokenizer.vocab_size) == (
        torch.float32,
        "模型",
        300,
    )


def test_an_import_of_low_precision_computes_in_it(run_dir, tmp_path, capsys):
    assert main(["export", str(run_dir), "--output", str(tmp_path / "hf"), "--dtype", "bf16"]) == 0
    assert main(["import", str(tmp_path / "hf"), "--output", str(tmp_path / "imported")]) == 0
    parameters = open_generator(tmp_path / "imported").network.parameters()
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}


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
    assert code == 2 and "or a folder that `megallama import` or" in err


def test_ids_that_no_tokenizer_can_show_are_not_drawn(imported):
    generator = open_generator(imported)
    few = dataclasses.replace(generator, tokenizer=SimpleNamespace(vocab_size=40), end_ids=(39,))
    drawn = set(few.continue_ids([20], max_new_tokens=100, sampling=Sampling(temperature=100.0)))
    assert len(drawn) > 10 and max(drawn) < 39


def test_a_prompt_beyond_the_model_is_refused(imported, tmp_path, capsys):
    from megallama.tokenizers.training import train_tokenizer

    run = tmp_path / "run"
    shutil.copytree(imported, run)
    (tmp_path / "t.txt").write_text("".join(chr(0x4E00 + i) for i in range(400)) * 3, encoding="utf-8")
    shutil.rmtree(run / "tokenizer")
    train_tokenizer([tmp_path / "t.txt"], run / "tokenizer", vocab_size=670)
    code, out, err = output_of(capsys, run, "--prompt", "".join(chr(0x4E00 + i) for i in range(400)))
    assert code == 2 and out == "" and "and the model has 300 ids" in err, err


def test_text_and_export_are_those_of_our_own_forward(run_dir, tmp_path, capsys):
    """Greedy, in fp32: `generate`, transformers on the export, and the forward that trained it, without a cache."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(["export", str(run_dir), "--output", str(tmp_path / "hf")]) == 0
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    config = load_yaml(run_dir / "config.yaml")
    config = dataclasses.replace(config, parallel=ParallelConfig(), zero=ZeroConfig(stage=0))
    checkpoint = max((run_dir / "checkpoints").glob("step-*"))
    ours = load_tokenizer(run_dir / "tokenizer")
    prompts = ["春天来了，花", "for i", "print(i)\n春"]
    ids = [ours.encode(prompt) for prompt in prompts]
    (wanted,) = run_ranks(1, greedy_tokens, config, checkpoint, ids, 14)
    capsys.readouterr()
    for prompt, given, tokens in zip(prompts, ids, wanted, strict=True):
        new = tokens[: tokens.index(ours.eod_id)] if ours.eod_id in tokens else tokens
        arguments = ["--prompt", prompt, "--temperature", "0", "--max-new-tokens", "14"]
        text = output_of(capsys, run_dir, *arguments)[1]
        assert text == prompt + ours.decode(given + new)[len(prompt) :] + "\n"
        batch = tokenizer(prompt, return_tensors="pt")
        assert batch.input_ids[0].tolist() == given, "another tokenizer"
        got = model.generate(**batch, max_new_tokens=14, do_sample=False)[0].tolist()
        assert [token for token in got if token != ours.eod_id] == given + new
