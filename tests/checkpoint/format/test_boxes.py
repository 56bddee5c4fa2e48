"""Flat ranges as boxes, and the boxes of a rank."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.checkpoint.format.boxes import build_boxes, cover_problem, split_range
from megallama.engine.fragment import Fragment
from megallama.model.layout import Piece
from tests.checkpoint.synthetic import KINDS, SHAPES, Layout, boxes_of, canonical, wrong_elements


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int, int | None]:
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=4)))
    begin = draw(st.integers(0, math.prod(shape)))
    end = draw(st.integers(begin, math.prod(shape)))
    return shape, begin, end, draw(st.none() | st.integers(1, 60))


@settings(max_examples=400, deadline=None)
@given(ranges())
def test_boxes_are_the_range_in_order(case: tuple[tuple[int, ...], int, int, int | None]) -> None:
    shape, begin, end, cap = case
    numbers = torch.arange(math.prod(shape)).view(shape)
    boxes = list(split_range(shape, begin, end, cap_elements=cap))
    found = [
        numbers[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))].reshape(-1)
        for offset, size in boxes
    ]
    assert torch.cat([torch.empty(0, dtype=torch.int64), *found]).tolist() == list(range(begin, end))
    if cap is None:
        assert len(boxes) <= max(1, 2 * len(shape) - 1)
    else:
        assert all(math.prod(size) <= cap for _, size in boxes)


def test_a_cap_leaves_few_boxes() -> None:
    assert len(list(split_range((1000, 100), 0, 100_000, cap_elements=1000))) == 100
    assert list(split_range((4, 3, 2), 1, 23)) == [
        ((0, 0, 1), (1, 1, 1)),
        ((0, 1, 0), (1, 2, 2)),
        ((1, 0, 0), (2, 3, 2)),
        ((3, 0, 0), (1, 2, 2)),
        ((3, 2, 0), (1, 1, 1)),
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_exact_partitions_are_told_from_others(sides: list[int], data: st.DataObject) -> None:
    shape, total = tuple(sides), math.prod(sides)
    cuts = sorted(data.draw(st.sets(st.integers(0, total))) | {0, total})
    boxes = [
        box for begin, end in zip(cuts, cuts[1:], strict=False) for box in split_range(shape, begin, end)
    ]
    assert cover_problem(shape, data.draw(st.permutations(boxes))) is None
    assert "hold" in str(cover_problem(shape, boxes[1:]))
    assert "hold" in str(cover_problem(shape, [*boxes, boxes[0]]))
    outside = (tuple(o + 1 for o in boxes[-1][0]), boxes[-1][1])
    assert "outside" in str(cover_problem(shape, [*boxes[:-1], outside]))


def test_an_overlap_that_hides_a_hole_is_found() -> None:
    boxes = [((0, 0), (2, 2)), ((1, 1), (2, 2)), ((2, 0), (1, 1))]
    assert sum(math.prod(size) for _, size in boxes) == 9
    assert "overlap" in str(cover_problem((3, 3), boxes))


@pytest.mark.parametrize(
    "layout", [Layout(1, 1), Layout(2, 1), Layout(1, 3), Layout(2, 4), Layout(2, 3, False)]
)
def test_owners_together_hold_every_element_once(layout: Layout) -> None:
    everything: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for rank in range(layout.tp * layout.dp):
        boxes = boxes_of(layout, rank, cap=50)
        assert wrong_elements(boxes) == 0
        for key, tensor in boxes.items():
            if tensor.is_owner:
                everything.setdefault(key, []).extend((o, tuple(v.shape)) for o, v in tensor.boxes.items())
    assert sorted(everything) == sorted(f"{kind}/{name}" for kind in KINDS for name in SHAPES)
    for key, found in everything.items():
        assert cover_problem(canonical(key).shape, found) is None, key


def test_boxes_are_views_of_the_state() -> None:
    flat = torch.zeros(12)
    layout = {"w": [Piece("w", (4, 3), (0, 0), (4, 3), 0, True)]}
    boxes = build_boxes([Fragment("w", 0, 12, {"fp32": flat}, True)], layout, cap_elements=None)
    boxes["fp32/w"].boxes[(0, 0)][2, 1] = 7.0
    assert flat.tolist().index(7.0) == 7
