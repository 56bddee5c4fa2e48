"""The table of `megallama verify` keeps its columns, however long the names of layouts are."""

from __future__ import annotations

from megallama.verification.compare import QUANTITIES
from megallama.verification.layouts import parse_layouts
from megallama.verification.report import LayoutResult, header, name_width, row


def test_columns_stand_under_each_other():
    layouts = parse_layouts(
        "tp=2;tp=2,sp=true,pp=2,vp=2,zero=2,recompute=full,mbs=2,ties=true,cp=2,cp_kind=ulysses"
    )
    width = name_width(layouts)
    errors = dict.fromkeys(QUANTITIES, 1e-12)
    rows = [
        row(LayoutResult(layout, 2, True, errors, {}, "", {}, None, 1.0), width=width) for layout in layouts
    ]
    head = header(name="x", steps=1, dtype="fp64", width=width).splitlines()[1]
    assert len({line.index("  equal") for line in rows} | {head.index("  verdict")}) == 1
    assert all(line[width : width + 6] == "     2" for line in rows)
