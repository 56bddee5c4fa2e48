"""Initial weights are a function of name and seed, whatever part of the tensor a rank holds."""

import itertools

import pytest
import torch

from megallama.config.schema import ModelConfig
from megallama.model.initialize import initialize_parameter
from megallama.model.layout import Piece

MODEL = ModelConfig(
    name="t",
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=8,
    num_heads=2,
    vocab_size=8,
    max_seq_len=8,
    init_std=0.5,
)
COLUMN_CUT = "decoder.layers.0.self_attention.linear_proj.weight"
ROW_CUT = "decoder.layers.0.mlp.linear_fc1.weight_w"


def part(key, shape, *, offset=(0, 0), extent=None, seed=1):
    extent = extent or shape
    tensor = torch.full(extent, float("nan"))
    piece = Piece(key=key, global_shape=shape, offset=offset, shape=extent, start=0, is_owner=True)
    initialize_parameter(tensor, [piece], model=MODEL, seed=seed)
    return tensor


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 6])
def test_row_parts_are_slices_of_the_whole(cut):
    whole = part(ROW_CUT, (150, 20))
    edges = [150 * i // cut for i in range(cut + 1)]
    parts = [
        part(ROW_CUT, (150, 20), offset=(a, 0), extent=(b - a, 20)) for a, b in itertools.pairwise(edges)
    ]
    assert torch.equal(torch.cat(parts, 0), whole)


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
def test_column_parts_are_slices_of_the_whole(cut):
    whole = part(COLUMN_CUT, (20, 150))
    edges = [150 * i // cut for i in range(cut + 1)]
    parts = [
        part(COLUMN_CUT, (20, 150), offset=(0, a), extent=(20, b - a)) for a, b in itertools.pairwise(edges)
    ]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_names_and_seeds_give_different_weights_of_the_right_size():
    one = part(ROW_CUT, (640, 64))
    assert not torch.equal(one, part(ROW_CUT.replace("0", "1"), (640, 64)))
    assert not torch.equal(one, part(ROW_CUT, (640, 64), seed=2))
    assert not torch.equal(one[:64], one[64:128]), "blocks repeat"
    assert abs(float(one.std()) - 0.5) < 0.01 and abs(float(one.mean())) < 0.01
    assert abs(float(part(COLUMN_CUT, (640, 64)).std()) - 0.25) < 0.005, (
        "residual outputs are scaled by 1/sqrt(2L)"
    )


def test_norms_start_at_one():
    tensor = torch.zeros(8)
    piece = Piece(
        key="decoder.final_layernorm.weight",
        global_shape=(8,),
        offset=(0,),
        shape=(8,),
        start=0,
        is_owner=True,
    )
    initialize_parameter(tensor, [piece], model=MODEL, seed=1)
    assert torch.equal(tensor, torch.ones(8))
