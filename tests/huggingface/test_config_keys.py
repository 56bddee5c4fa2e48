"""Keys of config.json: what could change the computation is translated or refused by name, the rest is accepted."""

import json

import pytest

from megallama.cli import main
from megallama.huggingface.import_model import import_model
from tests.huggingface.models import changed_config

REFUSED = {
    "unknown key": ({"a_new_idea": 3}, "a_new_idea (3) is unknown"),
    "family": ({"model_type": "gemma2"}, "model_type ('gemma2') is not supported"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu' is supported"),
    "attention bias": ({"attention_bias": True}, "attention_bias is True"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias is True"),
    "window": ({"sliding_window": 4096}, "sliding_window is 4096, only full attention (null)"),
    "layer types": ({"layer_types": ["sliding_attention"] * 4}, "layer_types is"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
    "partial rotation": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor other than 1",
    ),
    "long rope": (
        {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
        "rope_type 'longrope' is not supported",
    ),
    "rope key": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "alpha": 1}},
        "alpha of the linear rope is unknown",
    ),
    "truncate": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
        "truncate of the yarn rope is False",
    ),
    "two ropes": ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5.0}, "disagree"),
    "missing size": ({"hidden_size": "absent"}, "hidden_size is missing"),
    "wrong type": ({"hidden_size": "wide"}, "model.hidden_size"),
    "wrong shape": ({"num_attention_heads": 3}, "model.num_heads (3) must be a multiple"),
    "negative": ({"num_hidden_layers": -4}, "model.num_layers (-4) must be at least 1"),
    "other weights": ({"intermediate_size": 128}, "is [96, 64], not [128, 64]"),
    "fewer layers": ({"num_hidden_layers": 3}, "model.layers.3.input_layernorm.weight is unknown"),
    "more layers": ({"num_hidden_layers": 5}, "model.layers.4.input_layernorm.weight is missing"),
    "tie": ({"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_named(name, folder, tmp_path, capsys):
    changes, message = REFUSED[name]
    source = changed_config(folder / "llama2", tmp_path / "changed", **changes)
    code = main(["import", str(source), "--output", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert code == 2 and message in error and len(error.splitlines()) == 1, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed"], "something is left"


def test_older_forms_of_the_rope_are_read(folder, tmp_path):
    old = {"rope_type": "absent", "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    del old["rope_type"]
    source = changed_config(
        folder / "llama2", tmp_path / "old", rope_parameters="absent", rope_scaling=old, rope_theta=1e6
    )
    model = import_model(source, tmp_path / "out")
    assert (model.rope_scaling.value, model.rope_scaling_factor, model.rope_theta) == ("yarn", 4.0, 1e6)


REAL = {
    "qwen": {"use_mrope": False, "max_window_layers": 28, "use_sliding_window": False},
    "names": {
        "_name_or_path": "/home/a/llama",
        "_commit_hash": "af1",
        "name_or_path": None,
        "license": "mit",
    },
    "token ids": {"pad_token_id": 0, "sep_token_id": 5, "image_token_id": 9, "decoder_start_token_id": 1},
    "tools": {
        "unsloth_fixed": True,
        "unsloth_version": "2024.9",
        "mlx_version": "0.1.2",
        "use_flash_attn": True,
    },
    "sampling": {"temperature": 0.7, "top_p": 0.9, "do_sample": True, "max_length": 20, "num_beams": 1},
    "off": {"a_new_idea": None, "use_a_new_idea": False, "logits_scaling": 1.0, "use_qk_norm": False},
    "zero": {
        **{f"{name}_dropout_prob": 0.0 for name in ("hidden", "attention_probs")},
        **{"resid_pdrop": 0.0, "embd_pdrop": 0, "bias": False, "add_bias_linear": False, "alibi": False},
    },
    "kernels": {"attn_implementation": "sdpa", "use_flash_attention": True, "version": "1.0"},
    "early": {"architectures": ["LLaMAForCausalLM"], "max_sequence_length": 64, "is_decoder": True},
    "rope": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": None, "finetuned": True}
    },
}


@pytest.mark.parametrize("name", REAL)
def test_keys_without_effect_are_accepted_and_kept(name, folder, tmp_path):
    source = changed_config(folder / "llama2", tmp_path / "changed", **REAL[name])
    plain = import_model(folder / "llama2", tmp_path / "plain", name="m")
    assert import_model(source, tmp_path / "out", name="m") == plain
    kept = json.loads((tmp_path / "out" / "huggingface" / "config.json").read_text(encoding="utf-8"))
    assert all(kept[key] == value for key, value in REAL[name].items())


CHANGING = {
    "mrope": {"use_mrope": True},
    "another norm": {"use_qk_norm": True},
    "scaled logits": {"logits_scaling": 8.0},
    "experts": {"num_local_experts": 8},
    "no rope": {"use_rope": False},
    "no gate": {"use_gated_mlp": False},
    "layers without rope": {"no_rope_layers": [1, 0]},
    "a version that is no program's": {"attention_version": 2},
    "other versions": {"rope_version": "2.0", "attention_version": "1.0", "version": 2},
    "parts off": {
        f"use_{part}": False
        for part in ("positional_encoding", "pos_emb", "tied_embeddings", "softmax", "post_ln", "rms")
    },
    "dropout": {
        name: 0.1
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop")
    },
    "others": {"attn_implementation": "linear", "bias": True, "add_bias_linear": True, "alibi": True},
}


@pytest.mark.parametrize("name", CHANGING)
def test_keys_that_would_be_another_model_are_refused(name, folder, tmp_path, capsys):
    source = changed_config(folder / "llama2", tmp_path / "changed", **CHANGING[name])
    assert main(["import", str(source), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert [key for key in CHANGING[name] if f"{key} (" not in error and f"{key} is" not in error] == []


def test_unknown_keys_are_accepted_by_name_from_import_to_export(folder, tmp_path, capsys):
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "alpha": 1}
    source = changed_config(folder / "linear", tmp_path / "there", a_new_idea=3, rope_parameters=rope)
    command = ["import", str(source), "--output", str(tmp_path / "imported")]
    assert main(command) == 2
    flags = ["--ignore-key", "a_new_idea", "--ignore-key", "rope_parameters.alpha"]
    assert f"or import it with {' '.join(flags)} if that changes nothing" in capsys.readouterr().err
    assert main([*command, *flags]) == 0
    assert main(["export", str(tmp_path / "imported"), "--output", str(tmp_path / "back")]) == 0
    back = json.loads((tmp_path / "back" / "config.json").read_text(encoding="utf-8"))
    assert back == json.loads((source / "config.json").read_text(encoding="utf-8"))
    for path, extra in (
        (source, [*flags, *flags]),
        (tmp_path / "imported", []),
        (tmp_path / "imported", flags),
    ):
        like = ["--like", str(path), *extra]
        target = tmp_path / f"like-{path.name}-{len(extra)}"
        assert main(["export", str(tmp_path / "imported"), "--output", str(target), *like]) == 0


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("sliding_window", "--ignore-key sliding_window: sliding_window changes what the model computes"),
        ("mlp_bias", "--ignore-key mlp_bias: mlp_bias changes what the model computes"),
        ("rope_parameters.factor", "factor changes what the model computes"),
        ("a_new_idee", "has no such key: leave it out, or correct the name"),
    ],
)
def test_what_is_known_or_absent_cannot_be_ignored(key, message, folder, tmp_path, capsys):
    changes = {"mlp_bias": True, "sliding_window": 8}
    source = changed_config(folder / "linear", tmp_path / "changed", **changes)
    assert main(["import", str(source), "--output", str(tmp_path / "out"), "--ignore-key", key]) == 2
    assert message in capsys.readouterr().err
