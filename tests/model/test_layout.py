"""The canonical layout: every element of every parameter has one place, and the places of all ranks fill the model."""

import math

import pytest
import torch

from megallama.config.load import load_config
from megallama.host.launch import read_launch_environment
from megallama.model.counts import count_parameters
from megallama.model.rope import attention_factor, inverse_frequencies
from megallama.topology.connect import connect
from tests.support.builders import build_stage
from tests.support.jobs import SMALL
from tests.support.ranks import run_ranks

OVERRIDES = [*SMALL, "train.run_dir=unused", "model.vocab_size=100"]


def pieces_and_weights(extra):
    config = load_config([*OVERRIDES, *extra])
    with connect(config.parallel, environment=read_launch_environment()) as topology:
        stage = build_stage(config, topology)
        parameters = dict(stage.module.named_parameters())
        found = []
        for name, pieces in stage.layout.items():
            for piece in pieces:
                flat = parameters[name].detach().reshape(-1)
                data = flat[piece.start : piece.start + math.prod(piece.shape)].view(piece.shape)
                found.append((piece, data.clone()))
        return found


def whole(extra, world_size):
    """The canonical tensors, put together from the owners' pieces of all ranks."""
    tensors = {}
    for rank in run_ranks(world_size, pieces_and_weights, extra):
        for piece, data in rank:
            if piece.is_owner:
                target = tensors.setdefault(piece.key, torch.full(piece.global_shape, float("nan")))
                box = tuple(slice(o, o + s) for o, s in zip(piece.offset, piece.shape, strict=True))
                assert target[box].isnan().all() or torch.equal(target[box], data), (
                    f"{piece.key} is written twice"
                )
                target[box] = data
    assert not any(tensor.isnan().any() for tensor in tensors.values()), "holes"
    return tensors


@pytest.mark.parametrize(
    ("world_size", "extra"),
    [
        (2, ["parallel.tp=2"]),
        (4, ["parallel.tp=4", "model.num_kv_heads=2"]),
        (2, ["parallel.pp=2"]),
        (4, ["parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true"]),
        (2, ["parallel.pp=2", "parallel.vp=2", "model.tie_embeddings=true"]),
        (3, ["parallel.pp=3", "parallel.layers_per_stage=[2,1,1]"]),
        (2, ["parallel.tp=2", "model.qkv_bias=true", "model.qk_norm=true"]),
    ],
)
def test_initial_weights_do_not_depend_on_the_layout(world_size, extra):
    model = [word for word in extra if word.startswith("model.")]
    wanted, got = whole(model, 1), whole(extra, world_size)
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[key], got[key]) for key in wanted)


@pytest.mark.parametrize("extra", [[], ["model.qkv_bias=true", "model.qk_norm=true", "model.head_dim=24"]])
def test_canonical_tensors_are_as_many_as_are_counted(extra):
    config = load_config([*OVERRIDES, *extra])
    tensors = whole(extra, 1)
    assert {float(tensor.max()) for key, tensor in tensors.items() if tensor.dim() == 1} <= {0.0, 1.0}
    assert all(float(tensor.max()) == 0 for key, tensor in tensors.items() if key.endswith(".bias"))
    assert sum(tensor.numel() for tensor in tensors.values()) == count_parameters(config.model, padded=True)
    assert tensors["embedding.word_embeddings.weight"].shape[0] == 128, "the vocabulary is padded"


ROPES = {
    "llama2_7b": {"rope_type": "default"},
    "llama31_8b": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama32_1b": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "qwen25_7b yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "llama2_7b yarn": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "attention_factor": 1.5,
    },
    "llama2_7b linear": {"rope_type": "linear", "factor": 2.5},
    "llama2_7b dynamic": {"rope_type": "dynamic", "factor": 3.0},
}


@pytest.mark.parametrize("name", ROPES)
def test_rotary_frequencies_equal_transformers(name):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters, words = dict(ROPES[name]), [f"model={name.split()[0]}", "model.vocab_size=100"]
    ours = {
        "factor": "rope_scaling_factor",
        "original_max_position_embeddings": "rope_original_max_seq_len",
        "beta_fast": "rope_beta_fast",
        "beta_slow": "rope_beta_slow",
        "attention_factor": "rope_attention_factor",
    }
    kind = parameters["rope_type"]
    if " " in name:
        words += [f"model.{ours[key]}={value}" for key, value in parameters.items() if key in ours]
        words += [f"model.rope_scaling={kind}"]
    # transformers takes what dynamic NTK was trained for from max_position_embeddings.
    words += ["model.rope_original_max_seq_len=4096"] if kind == "dynamic" else []
    model = load_config([*OVERRIDES, *words]).model
    peer = LlamaConfig(
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        head_dim=model.head_width,
        max_position_embeddings=model.max_seq_len,
        rope_parameters={**parameters, "rope_theta": model.rope_theta},
    )
    for seq_len in (64, 4096, 10000):
        if kind == "default":
            wanted = LlamaRotaryEmbedding(peer).inv_freq, 1.0
        else:
            wanted = ROPE_INIT_FUNCTIONS[kind](peer, seq_len=seq_len)
        got = inverse_frequencies(model, seq_len=seq_len)
        assert torch.allclose(got, wanted[0], rtol=1e-6, atol=0)
        assert attention_factor(model) == pytest.approx(wanted[1])
