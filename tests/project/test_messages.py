"""What a user is told: `<What> (<values>): <what to change>`, in every message that the source spells out."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.support.places import ROOT

PACKAGE = ROOT / "megallama"


def spelt_out(node: ast.AST | None) -> str | None:
    """The text of a literal, with {} for what is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def messages() -> Iterator[tuple[str, str]]:
    """(place, text) of every message that is raised, or that a rule of the check yields."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = None
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UserError":
                text = spelt_out(node.args[0])
            elif isinstance(node, ast.Yield) and path.name.startswith("check_"):
                text = spelt_out(node.value)
            if text is not None:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", text


def test_every_message_says_what_to_change():
    found = list(messages())
    assert len(found) > 200
    silent = [f"{place}: {text}" for place, text in found if not re.search(r"[:;] \S", text)]
    assert not silent, "\n".join(silent)
