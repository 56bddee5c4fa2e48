"""The tokenizer of an exported folder: what transformers needs is there, and where it cuts otherwise, that is said."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import yaml

from megallama.cli import main
from megallama.config.load import load_config, to_yaml
from megallama.generate import open_generator
from megallama.huggingface.tokenizer.agreement import disagreements, sample_of_run
from megallama.huggingface.tokenizer.export import write_tokenizer
from megallama.huggingface.tokenizer.run_data import begin_of_run
from megallama.prepare.run import prepare
from megallama.tokenizers.begin import begin_token
from megallama.tokenizers.convert import tokenizer_json
from megallama.tokenizers.load import SentencePieceTokenizer, load_tokenizer
from megallama.tokenizers.training import train_tokenizer
from tests.huggingface.models import make_model
from tests.support.jobs import SMALL
from tests.support.materials import MISTRAL
from tests.tokenizers.test_rank_files import describe, small


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    """An import without a tokenizer, of 301 ids."""
    folder = tmp_path_factory.mktemp("model")
    make_model("llama2", folder / "there", vocab_size=301)
    assert main(["import", str(folder / "there"), "--output", str(folder / "imported")]) == 0
    return folder / "imported"


def with_ranks(imported: Path, folder: Path) -> Path:
    run = folder / "run"
    shutil.copytree(imported, run)
    (run / "tokenizer").mkdir()
    ranks = small(run / "tokenizer" / "ours.tiktoken")
    describe(ranks, special_tokens={"<|完|>": 300, "<|pad|>": 290}, normalization="NFC")
    (run / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    return run


def test_an_exported_folder_has_what_transformers_and_people_ask_for(imported, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = with_ranks(imported, tmp_path)
    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.model_max_length) == ("<|pad|>", "<|完|>", 64)
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    assert tokenizer.chat_template == "{{ messages }}"
    batch = tokenizer(["中国", "a 中国 b"], padding=True, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generate(**batch, max_new_tokens=2, do_sample=False).shape[0] == 2
    assert model.generation_config.pad_token_id == 290
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"license": "other", "library_name": "transformers", "pipeline_tag": "text-generation"}
    assert "| context | 64 tokens |" in card and "| vocabulary | 301 |" in card
    assert "| training" not in card and "| steps" not in card, "an import was not trained"
    err = capsys.readouterr().err
    assert "reads the name of a special token in a text as that token" in err and "cuts" not in err


def test_a_folder_without_a_tokenizer_is_said_aloud(imported, tmp_path, capsys):
    assert main(["export", str(imported), "--output", str(tmp_path / "out")]) == 0
    assert "holds no tokenizer, so" in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_said_aloud(imported, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(imported, run)
    (run / "tokenizer").mkdir()
    shutil.copyfile(MISTRAL, run / "tokenizer" / "tokenizer.model")
    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 0
    assert (
        "has 32000 ids, and the model 301: put the tokenizer of this model there" in capsys.readouterr().err
    )


def test_what_the_source_says_is_kept(tmp_path):
    shutil.copyfile(MISTRAL, tmp_path / "tokenizer.model")
    source = {"pad_token": "<unk>", "model_max_length": 77, "chat_template": "{{ x }}", "legacy": True}
    source |= {"tokenizer_class": "LlamaTokenizer", "auto_map": {"AutoTokenizer": ["a.B", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(source), encoding="utf-8")
    (tmp_path / "out").mkdir()
    exported = write_tokenizer(
        tmp_path / "tokenizer.model", tmp_path / "out", context=4096, begin_id=begin_token
    )
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert exported.pad_id == 0 and config["pad_token"] == "<unk>" and config["chat_template"] == "{{ x }}"
    assert (config["model_max_length"], config["eos_token"], config["bos_token"]) == (77, "</s>", "<s>")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "legacy" not in config and "auto_map" not in config


def test_texts_that_transformers_cuts_otherwise_are_told_with_an_example(tmp_path):
    """A piece whose character is none, as a merge may leave it: sentencepiece joins it, a tokenizer.json cannot."""
    proto = SentencePieceTokenizer(MISTRAL).proto
    lowest = min(piece.score for piece in proto.pieces)
    proto.pieces.add(piece="曹龘", score=lowest - 64, type=1)
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    (tmp_path / "out").mkdir()
    exported = write_tokenizer(
        tmp_path / "tokenizer.model", tmp_path / "out", context=64, begin_id=begin_token
    )
    found = disagreements(tmp_path / "out", exported.tokenizer, ["却说曹操", "却说曹龘何往"], begin_id=None)
    assert len(found) == 2 and found[0].startswith("transformers cuts 1 of 19 texts into other tokens"), found
    assert "'曹龘' is [" in found[0]


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("begin", ["always", "never", "tokenizer"])
def test_a_begin_token_of_the_data_is_that_of_the_export(begin, kind, imported, tmp_path):
    """What the data were prepared with counts, not what the tokenizer and the files beside it say."""
    from transformers import AutoTokenizer

    (tmp_path / "t.txt").write_text("却说曹操", encoding="utf-8")
    model = tmp_path / kind
    if kind == "tokenizer.model":
        shutil.copyfile(MISTRAL, model)
    else:
        made = tokenizer_json(load_tokenizer(MISTRAL), begin_id=1 if begin == "never" else None)
        made.save(str(model))
    asked = {"add_bos_token": begin != "always"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(asked), encoding="utf-8")
    prepare([tmp_path / "t.txt"], tmp_path / "data", tokenizer=model, validation_fraction=0, begin=begin)
    run = tmp_path / "run"
    run.mkdir()
    assert begin_of_run(run, load_tokenizer(model)) == (None if begin == "always" else 1)
    config = load_config([*SMALL, f"data.sources=[{{path: {tmp_path}/data/train}}]", f"train.run_dir={run}"])
    (run / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (tmp_path / "out").mkdir()
    exported = write_tokenizer(model, tmp_path / "out", context=64, begin_id=partial(begin_of_run, run))
    ids = load_tokenizer(model).encode("却说")
    wanted = ids if begin == "never" else [1, *ids]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("却说").input_ids == wanted
    other = 1 if exported.begin_id is None else None
    for expected, count in ((exported.begin_id, 0), (other, 1)):
        found = disagreements(tmp_path / "out", exported.tokenizer, [], begin_id=expected)
        assert sum("before a text" in line for line in found) == count, found


def test_of_two_tokenizers_in_a_folder_one_is_loaded_kept_and_exported(imported, tmp_path, capsys):
    """A tokenizer.json with one end token more than the tokenizer.model beside it, and a class that cuts otherwise."""
    there = tmp_path / "there"
    make_model("llama2", there, vocab_size=291)
    (tmp_path / "t.txt").write_text("却说曹操大军 the cat\n" * 30, encoding="utf-8")
    train_tokenizer([tmp_path / "t.txt"], there, vocab_size=290)
    made = tokenizer_json(load_tokenizer(there))
    made.add_special_tokens(["<|im_end|>"])
    made.save(str(there / "tokenizer.json"))
    said = {"eos_token": "<|im_end|>", "tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False}
    (there / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")
    assert main(["import", str(there), "--output", str(tmp_path / "imported")]) == 0
    generator = open_generator(tmp_path / "imported")
    assert (generator.tokenizer.eod_id, generator.tokenizer.vocab_size) == (290, 291)
    assert generator.end_ids[0] == 290
    for number, like in enumerate(([], ["--like", str(there)], ["--like", str(tmp_path / "imported")])):
        out = tmp_path / f"out{number}"
        assert main(["export", str(tmp_path / "imported"), "--output", str(out), *like]) == 0
        assert load_tokenizer(out).eod_id == 290 and not (out / "tokenizer.model").exists()
        config = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert (config["eos_token"], config["tokenizer_class"]) == ("<|im_end|>", "PreTrainedTokenizerFast")
        assert "add_prefix_space" not in config and " cuts " not in capsys.readouterr().err


def test_the_sample_is_of_the_runs_own_documents(tmp_path):
    texts = ["却说曹操大军", "x  y\tz", "再说刘备"]
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (tmp_path / "t.jsonl").write_text("".join(lines), encoding="utf-8")
    prepare([tmp_path / "t.jsonl"], tmp_path / "data", tokenizer=MISTRAL, validation_fraction=0)
    sources = f"data.sources=[{{path: {tmp_path}/data/train}},{{path: {tmp_path}/gone}}]"
    config = load_config([*SMALL, sources, f"train.run_dir={tmp_path / 'run'}"])
    (tmp_path / "run").mkdir()
    assert sample_of_run(tmp_path / "run", load_tokenizer(MISTRAL)) == []
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert sample_of_run(tmp_path / "run", load_tokenizer(MISTRAL)) == texts
