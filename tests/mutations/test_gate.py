"""make test catches every planted bug: each layout that shows one is among those that make test proves."""

from __future__ import annotations

from megallama.verification.layouts import parse_layouts
from tests.layouts.named import NAMED
from tests.mutations.planted import SHOWS_IN


def key(layout):
    """What makes two layouts the same, whatever the order of their words."""
    return layout.dp, frozenset(map(str, layout.settings))


def test_every_planted_bug_shows_in_a_layout_of_the_gate():
    proved = {key(layout) for layouts in NAMED.values() for layout in layouts}
    unseen = {name: text for name, text in SHOWS_IN.items() if key(parse_layouts(text)[0]) not in proved}
    assert unseen == {}
