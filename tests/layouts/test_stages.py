"""Layers over stages and micro-batches over chunks."""

import pytest

from megallama.grid import micro_batch_group_size, split_layers


@pytest.mark.parametrize(
    ("num_layers", "stages", "layers"),
    [
        (32, 4, [8, 8, 8, 8]),
        (126, 16, [7, *[8] * 14, 7]),  # LLaMA 3 405B
        (5, 2, [3, 2]),
        (5, 4, [1, 2, 1, 1]),
        (3, 3, [1, 1, 1]),
    ],
)
def test_layers_are_even_and_the_ends_are_spared(num_layers, stages, layers):
    assert split_layers(num_layers, stages) == layers


def test_every_layer_is_placed_and_no_stage_is_empty():
    for num_layers in range(1, 20):
        for stages in range(1, num_layers + 1):
            layers = split_layers(num_layers, stages)
            assert sum(layers) == num_layers and max(layers) - min(layers) <= 1 and min(layers) >= 1


@pytest.mark.parametrize(
    ("micro_batches", "pp", "size"), [(8, 2, 2), (7, 2, 4), (5, 4, 5), (9, 4, 5), (10, 4, 5)]
)
def test_groups_of_micro_batches_leave_no_gap(micro_batches, pp, size):
    assert micro_batch_group_size(micro_batches, pp=pp) == size


def test_fewer_micro_batches_than_stages_are_refused():
    with pytest.raises(ValueError, match="at least as many micro-batches .3. as parallel.pp .4."):
        micro_batch_group_size(3, pp=4)
