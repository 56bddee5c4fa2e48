"""The canonical layout: every element of every parameter has one place, and the places of all ranks fill the model."""

import math

import pytest
import torch

from megallama.config.load import load_config
from megallama.host.launch import read_launch_environment
from megallama.model.build import build_model, head_dim
from megallama.model.counts import count_parameters
from megallama.model.rope import inverse_frequencies
from megallama.topology.connect import connect
from tests.jobs import SMALL
from tests.ranks import run_ranks

OVERRIDES = [*SMALL, "train.run_dir=unused", "model.vocab_size=100"]


def pieces_and_weights(extra):
    config = load_config([*OVERRIDES, *extra])
    with connect(config.parallel, environment=read_launch_environment()) as topology:
        stage = build_model(config, topology)
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
    ],
)
def test_initial_weights_do_not_depend_on_the_layout(world_size, extra):
    model = [word for word in extra if word.startswith("model.")]
    wanted, got = whole(model, 1), whole(extra, world_size)
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[key], got[key]) for key in wanted)


def test_canonical_tensors_are_as_many_as_are_counted():
    config = load_config(OVERRIDES)
    tensors = whole([], 1)
    assert sum(tensor.numel() for tensor in tensors.values()) == count_parameters(config.model, padded=True)
    assert tensors["embedding.word_embeddings.weight"].shape[0] == 128, "the vocabulary is padded"


@pytest.mark.parametrize("name", ["llama2_7b", "llama31_8b", "llama32_1b"])
def test_rotary_frequencies_equal_transformers(name):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model = load_config([*OVERRIDES, f"model={name}", "model.vocab_size=100"]).model
    parameters = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling.value == "llama3":
        parameters = {
            "rope_type": "llama3",
            "rope_theta": model.rope_theta,
            "factor": model.rope_scaling_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": model.rope_original_max_seq_len,
        }
    peer = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=model.hidden_size,
            num_attention_heads=model.num_heads,
            head_dim=head_dim(model),
            max_position_embeddings=model.max_seq_len,
            rope_parameters=parameters,
        )
    )
    ours = inverse_frequencies(model, head_dim=head_dim(model))
    assert torch.allclose(ours, peer.inv_freq, rtol=1e-6, atol=0)
