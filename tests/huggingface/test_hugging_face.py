"""Import and export: the logits of transformers, the same bits back, and no key or tensor dropped in silence."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megallama.checkpoint.offline.reader import CheckpointReader
from megallama.cli import main
from megallama.commands.export_model import parse_size
from megallama.config.load import load_config, model_to_yaml
from megallama.host.errors import ConfigError, UserError
from megallama.huggingface.export_model import export_model
from megallama.huggingface.import_model import import_model
from megallama.trainer.init_from import source_problems
from tests.huggingface.models import FAMILIES, changed_config, make_model, our_logits, tokens
from tests.support.jobs import SMALL, metrics, overrides, train, write_dataset
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def theirs(folder):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return {
            name: AutoModelForCausalLM.from_pretrained(folder / name)(tokens()).logits for name in FAMILIES
        }


@pytest.fixture(scope="module")
def ours(folder):
    """Whole logits of every family, by layout."""
    (one,) = run_ranks(1, our_logits, folder, list(FAMILIES), [])
    cut = run_ranks(4, our_logits, folder, list(FAMILIES), ["parallel.tp=2", "parallel.pp=2"])
    last = [rank for rank in cut if rank]
    assert len(last) == 2
    whole = {name: torch.cat([rank[name] for rank in last], dim=-1) for name in FAMILIES}
    return {"one rank": one, "tp2 pp2": whole}


@pytest.mark.parametrize("layout", ["one rank", "tp2 pp2"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name, layout, ours, theirs):
    wanted = theirs[name]
    got = ours[layout][name]
    assert got.shape[-1] == 128
    assert torch.allclose(got[..., : wanted.shape[-1]], wanted, rtol=0, atol=1e-4), (
        (got[..., : wanted.shape[-1]] - wanted).abs().max()
    )
    assert wanted.std() > 0.3, "nothing to compare"


def weights_of(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_is_the_same_to_the_bit(name, folder, tmp_path):
    export_model(folder / f"{name}-imported", tmp_path / "back")
    there, back = weights_of(folder / name), weights_of(tmp_path / "back")
    assert there.keys() == back.keys()
    assert all(torch.equal(there[key], back[key]) for key in there)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (folder / name / "config.json").read_text()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_shards_there_and_back(dtype, tmp_path):
    make_model("qwen25", tmp_path / "there", dtype=dtype, max_shard_size="40KB")
    assert len(list((tmp_path / "there").glob("model-*.safetensors"))) > 3
    import_model(tmp_path / "there", tmp_path / "imported")
    files = export_model(tmp_path / "imported", tmp_path / "back", max_shard_bytes=50_000)
    assert len(files) > 3 and "model.safetensors.index.json" in files
    there, back = weights_of(tmp_path / "there"), weights_of(tmp_path / "back")
    assert there.keys() == back.keys() and all(torch.equal(there[key], back[key]) for key in there)
    assert {tensor.dtype for tensor in back.values()} == {dtype}
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == back.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in back.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_of_our_own_makes_the_same_model_in_transformers(name, folder, theirs, tmp_path):
    """Without the original config.json, as after training: no missing or unexpected keys, the same logits."""
    from transformers import AutoModelForCausalLM

    run = tmp_path / "run"
    shutil.copytree(folder / f"{name}-imported", run)
    shutil.rmtree(run / "huggingface")
    write_run_config(run, name)
    export_model(run, tmp_path / "back", dtype="fp32")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        assert torch.allclose(model(tokens()).logits, theirs[name], rtol=0, atol=1e-5)


def write_run_config(run, name):
    from megallama.config.load import load_config, to_yaml
    from tests.support.jobs import SMALL

    words = [f"model={name}", *SMALL[3:], f"train.run_dir={run}", "train.seq_len=16"]
    config = load_config(words, extra_conf_dir=run / "conf")
    (run / "config.yaml").write_text(to_yaml(config), encoding="utf-8")


def test_an_import_holds_weights_only_and_pads_with_zeros(folder):
    reader = CheckpointReader(folder / "llama2-imported" / "checkpoints" / "step-00000000", verify="first")
    assert reader.kinds == ["fp32"] and "progress" not in reader.state
    embedding = reader.read("fp32/embedding.word_embeddings.weight")
    assert embedding.shape == (128, 64) and embedding.dtype == torch.float32
    assert not embedding[101:].any() and embedding[:101].all(dim=1).any()


def damage_truncate(folder):
    file = folder / "model-00002-of-00004.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def damage_header(folder):
    file = folder / "model-00002-of-00004.safetensors"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def damage_index(folder):
    (folder / "model.safetensors.index.json").write_text("{", encoding="utf-8")


def damage_escape(folder):
    file = folder / "model.safetensors.index.json"
    file.write_text(
        file.read_text().replace("model-00002-of-00004", "../model-00002-of-00004"), encoding="utf-8"
    )


def damage_swap(folder):
    shutil.copyfile(folder / "model-00001-of-00004.safetensors", folder / "model-00002-of-00004.safetensors")


def damage_pickle(folder):
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


DAMAGE = {
    "missing shard": (lambda f: (f / "model-00002-of-00004.safetensors").unlink(), "00004.safetensors is missing"),
    "truncated": (damage_truncate, "00002-of-00004.safetensors is damaged"),
    "empty": (lambda f: (f / "model-00002-of-00004.safetensors").write_bytes(b""), "is damaged (0 bytes"),
    "header": (damage_header, "00002-of-00004.safetensors is damaged"),
    "swapped": (damage_swap, "00002-of-00004.safetensors lacks"),
    "index": (damage_index, "model.safetensors.index.json cannot be read"),
    "path": (damage_escape, "'../model-00002-of-00004.safetensors' is no name of a .safetensors file"),
    "pickle": (damage_pickle, "pickled weights (pytorch_model.bin)"),
    "config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "model"
    make_model("llama2", folder, max_shard_size="150KB")
    assert len(list(folder.glob("model-*-of-00004.safetensors"))) == 4
    return folder


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folders_give_one_clear_message(name, sharded, tmp_path, capsys):
    damage, message = DAMAGE[name]
    shutil.copytree(sharded, tmp_path / "model")
    damage(tmp_path / "model")
    code = main(["import", str(tmp_path / "model"), "--output", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert code == 2 and message in error and len(error.splitlines()) == 1, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"], "something is left"


def listed_but_not_held(model, *names):
    """The index names tensors that no file holds, in a file that is there and in one that is not."""
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"] |= dict(zip(names, (files[-1], "model-00009-of-00009.safetensors"), strict=False))
    path.write_text(json.dumps(index), encoding="utf-8")


def test_an_index_may_name_what_says_nothing_of_its_own(sharded, tmp_path, capsys):
    """A tied head, and rotary frequencies, are left out by some writers, but not by their index."""
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    for names in (("lm_head.weight", frequencies), (frequencies, "lm_head.weight")):
        folder = tmp_path / names[0]
        make_model("llama32", folder, max_shard_size="150KB")
        import_model(folder, tmp_path / f"{names[0]}-plain")
        listed_but_not_held(folder, *names)
        import_model(folder, tmp_path / f"{names[0]}-listed")
        for one, other in zip(
            *(
                CheckpointReader(tmp_path / f"{names[0]}-{kind}" / "checkpoints" / "step-00000000").read_all()
                for kind in ("plain", "listed")
            ),
            strict=True,
        ):
            assert one[0] == other[0] and torch.equal(one[1], other[1])
    untied = tmp_path / "untied"
    shutil.copytree(sharded, untied)
    (untied / "model.safetensors.index.json").unlink()
    shutil.copyfile(sharded / "model.safetensors.index.json", untied / "model.safetensors.index.json")
    listed_but_not_held(untied, "model.layers.0.bias")
    assert main(["import", str(untied), "--output", str(tmp_path / "out")]) == 2
    assert "lacks model.layers.0.bias, which model.safetensors.index.json says" in capsys.readouterr().err


def test_the_folder_of_an_adapter_is_told_from_a_model(tmp_path, capsys):
    """Some write the config.json of the whole model beside it, and all the adapter's own weights."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base"}), "utf-8")
    for beside, content in (("adapter_model.safetensors", ""), ("config.json", '{"model_type": "llama"}')):
        (tmp_path / beside).write_text(content, encoding="utf-8")
        assert main(["import", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert "holds an adapter (adapter_config.json; LoRA or another) of the model 'base'" in error


def test_existing_output_is_refused(folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert main(["import", str(folder / "llama2"), "--output", str(tmp_path / "out")]) == 2
    assert main(["export", str(folder / "llama2-imported"), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("exists already: give a new folder") == 2
    assert list((tmp_path / "out").iterdir()) == []


def test_a_name_that_a_shipped_shape_has(folder, tmp_path, capsys):
    """Hydra would take the shipped one: the name is refused, before anything is written and where it is used."""
    code = main(["import", str(folder / "llama2"), "--output", str(tmp_path / "llama2_7b")])
    error = capsys.readouterr().err
    assert code == 2 and "name of the shape (llama2_7b) is that of another one in conf/model/" in error
    assert "--name" in error and list(tmp_path.iterdir()) == []
    words = ["model=llama_tiny", *SMALL[3:], "train.run_dir=r"]
    shipped = load_config(words).model
    own = tmp_path / "conf"
    (own / "model").mkdir(parents=True)
    for text, is_same in ((model_to_yaml(shipped), True), ("name: llama_tiny\nnum_layers: 2\n", False)):
        (own / "model" / "llama_tiny.yaml").write_text(text, encoding="utf-8")
        if is_same:
            assert load_config(words, extra_conf_dir=own).model == shipped
            continue
        with pytest.raises(ConfigError, match=f"model=llama_tiny is both in {own}/model and in .*: rename"):
            load_config(words, extra_conf_dir=own)


def test_export_refuses_another_model_and_damaged_checkpoints(folder, tmp_path):
    with pytest.raises(UserError, match=r"of another model than .*model.rope_theta \(10000.0 and 500000.0\)"):
        export_model(folder / "llama2-imported", tmp_path / "out", like=folder / "llama3")
    broken = tmp_path / "broken"
    shutil.copytree(folder / "llama2-imported", broken)
    file = broken / "checkpoints" / "step-00000000" / "rank-00000.bin"
    raw = bytearray(file.read_bytes())
    raw[1000] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match="damaged|no intact|no checkpoint"):
        export_model(broken, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_values_beyond_fp16_are_refused(tmp_path):
    model = make_model("llama2", tmp_path / "there")
    model.model.norm.weight.data[3] = 1e6
    model.save_pretrained(tmp_path / "there")
    import_model(tmp_path / "there", tmp_path / "imported")
    with pytest.raises(UserError, match="model.norm.weight has values beyond float16: use --dtype bf16"):
        export_model(tmp_path / "imported", tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_sizes():
    assert [parse_size(text) for text in ("5GB", "500 MB", "1000", "1.5kb")] == [
        5 * 10**9,
        5 * 10**8,
        1000,
        1500,
    ]
    for wrong in ("", "0", "GB", "-5GB", "5XB"):
        with pytest.raises(UserError, match="is not a size"):
            parse_size(wrong)


def test_training_goes_on_from_an_import_and_out_again(folder, tmp_path, capsys):
    """Over tp2 x pp2, with a learning rate of next to nothing: what comes out is what went in."""
    shape = yaml.safe_load((folder / "mistral-imported" / "conf" / "model" / "mistral.yaml").read_text())
    words = [f"model.{key}={value}" for key, value in shape.items()]
    words += [f"train.init_from={folder / 'mistral-imported'}", "optim.lr=1e-12", "train.steps=1"]
    run_ranks(4, train, overrides(tmp_path, *words, "parallel.tp=2", "parallel.pp=2"))
    like = ["--like", str(folder / "mistral")]
    assert (
        main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--dtype", "fp32", *like])
        == 0
    )
    there, back = weights_of(folder / "mistral"), weights_of(tmp_path / "out")
    assert there.keys() == back.keys()
    assert all(torch.allclose(there[key], back[key], rtol=0, atol=1e-9) for key in there)
    source = (folder / "mistral" / "config.json").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8")) == json.loads(source)


STARTS = {
    "one rank": (1, []),
    "tp2 pp2 zero2": (4, ["parallel.tp=2", "parallel.pp=2", "zero.stage=2"]),
    "dp2 zero3": (2, ["zero.stage=3"]),
}


@pytest.mark.parametrize("name", STARTS)
def test_training_starts_from_the_folder_itself_as_from_its_import(name, folder, tmp_path):
    """Fused rows, head norms, tied head, padding; cut along rows and columns: bit for bit what the import gives."""
    world_size, layout = STARTS[name]
    shape = yaml.safe_load((folder / "qwen3tied-imported" / "conf" / "model" / "qwen3tied.yaml").read_text())
    words = [*(f"model.{key}={value}" for key, value in shape.items()), *layout, "train.steps=1"]
    write_dataset(tmp_path / "data" / "train", vocab_size=101)
    for run_name in ("qwen3tied", "qwen3tied-imported"):
        source = f"train.init_from={folder / run_name}"
        run_ranks(world_size, train, overrides(tmp_path, *words, source, run_name=run_name))
    direct, imported = (metrics(tmp_path / run) for run in ("qwen3tied", "qwen3tied-imported"))
    for key in ("train/loss", "train/grad_norm"):
        assert direct[0][key] == imported[0][key], key
    log = (tmp_path / "qwen3tied" / "log" / "rank-00000.log").read_text(encoding="utf-8")
    assert f"weights from {folder / 'qwen3tied'}, fresh optimizer" in log


def test_what_is_wrong_with_a_folder_to_start_from_is_told_before_the_start(folder, tmp_path):
    shape = yaml.safe_load((folder / "llama2-imported" / "conf" / "model" / "llama2.yaml").read_text())
    words = [*SMALL, *(f"model.{key}={value}" for key, value in shape.items()), "train.run_dir=r"]

    def problems(path, *more):
        return source_problems(path, model=load_config([*words, *more]).model, own=tmp_path)

    assert problems(folder / "llama2") == []
    [text] = problems(folder / "llama2", "model.num_layers=2")
    assert "holds another model (num_layers: 4 there, 2 here): set these" in text
    broken = tmp_path / "broken"
    shutil.copytree(folder / "llama2", broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    [text] = problems(broken)
    assert text.startswith(f"train.init_from ({broken}): ") and "copy or download it again" in text
    changed_config(folder / "llama2", tmp_path / "odd", attention_softcap=3.0)
    [text] = problems(tmp_path / "odd")
    assert "attention_softcap" in text
