"""The arithmetic of the grid, against properties that every layout must have."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.grid import (
    AXES,
    Coordinates,
    Grid,
    nearest_multiples,
    num_micro_batches,
    padded_vocab_size,
)

sizes = st.integers(1, 3)
grids = st.builds(Grid, tp=sizes, cp=sizes, dp=sizes, pp=sizes)
positive = st.integers(1, 10_000)


@settings(deadline=None)
@given(grids)
def test_every_rank_has_a_place_of_its_own(grid):
    places = [grid.coordinates(rank) for rank in range(grid.world_size)]
    assert len(set(places)) == grid.world_size == grid.tp * grid.cp * grid.dp * grid.pp
    assert all(0 <= getattr(p, axis) < getattr(grid, axis) for p in places for axis in AXES)


def test_tp_varies_fastest_and_pp_slowest():
    grid = Grid(tp=2, cp=2, dp=2, pp=2)
    assert grid.coordinates(1) == Coordinates(tp=1, cp=0, dp=0, pp=0)
    assert grid.coordinates(2) == Coordinates(tp=0, cp=1, dp=0, pp=0)
    assert grid.coordinates(4) == Coordinates(tp=0, cp=0, dp=1, pp=0)
    assert grid.coordinates(8) == Coordinates(tp=0, cp=0, dp=0, pp=1)


@settings(deadline=None)
@given(grids, st.integers())
def test_ranks_outside_the_grid_are_refused(grid, rank):
    if 0 <= rank < grid.world_size:
        grid.coordinates(rank)
    else:
        with pytest.raises(AssertionError):
            grid.coordinates(rank)


@settings(deadline=None)
@given(grids, st.lists(st.sampled_from(AXES), unique=True))
def test_groups_partition_the_ranks(grid, axes):
    groups = grid.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(grid.world_size))
    size = 1
    for axis in axes:
        size *= getattr(grid, axis)
    for group in groups:
        assert len(group) == size and group == sorted(group)
        places = [grid.coordinates(rank) for rank in group]
        for axis in AXES:
            values = {getattr(place, axis) for place in places}
            assert values == (set(range(getattr(grid, axis))) if axis in axes else {getattr(places[0], axis)})
        assert all(grid.group_of(rank, *axes) == group for rank in group)


def test_groups_of_a_layout_worked_out_by_hand():
    grid = Grid(tp=2, cp=1, dp=2, pp=2)
    assert grid.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert grid.groups("dp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert grid.groups("pp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert grid.groups("tp", "pp") == grid.groups("pp", "tp") == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert grid.groups() == [[rank] for rank in range(8)]


@settings(deadline=None)
@given(grids, st.integers(0, 50))
def test_dp_is_what_remains(grid, surplus):
    model = grid.tp * grid.cp * grid.pp
    assert Grid.from_world_size(grid.world_size, tp=grid.tp, cp=grid.cp, pp=grid.pp) == grid
    world_size = grid.world_size + surplus
    if world_size % model:
        with pytest.raises(
            ValueError, match=rf"world_size \({world_size}\) must be a multiple of .* = {model}\)"
        ):
            Grid.from_world_size(world_size, tp=grid.tp, cp=grid.cp, pp=grid.pp)


@settings(deadline=None)
@given(positive, st.integers(1, 64), st.integers(1, 64))
def test_micro_batches_make_up_the_batch(batch, micro, dp):
    if batch % (micro * dp) == 0:
        assert num_micro_batches(batch, micro_batch_size=micro, dp=dp) * micro * dp == batch
        return
    with pytest.raises(ValueError, match=rf"\({batch}\) must be a multiple of .* = {micro * dp}\)") as caught:
        num_micro_batches(batch, micro_batch_size=micro, dp=dp)
    for remedy in re.findall(r"\d+", str(caught.value).split(": use ")[1]):
        assert num_micro_batches(int(remedy), micro_batch_size=micro, dp=dp) >= 1


@settings(deadline=None)
@given(positive, positive)
def test_the_padded_vocabulary_is_the_least_multiple(vocab_size, multiple):
    rows = padded_vocab_size(vocab_size, multiple=multiple)
    assert rows % multiple == 0 and 0 <= rows - vocab_size < multiple


def test_nearest_multiples():
    assert nearest_multiples(100, 32) == "96 or 128"
    assert nearest_multiples(5, 32) == "32"
