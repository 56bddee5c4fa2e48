"""The list of guarantees: what each test file promises, and the cases that hold it, by gate.

`tests/guarantees.yaml` is that list. A case that is removed or moved to another gate must be changed there too, where a
reviewer sees it; `python -m tests.project.guarantees` writes the cases again and keeps the sentences.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import yaml

from tests.support.places import ROOT

LIST = ROOT / "tests" / "guarantees.yaml"


def cases_of(path: Path) -> dict[str, list[str]]:
    """Names of the test functions of a file by gate: `test` for make test, `test-long` for make test-long."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    is_long_file = any(
        isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node.targets[0]) and _is_long(node.value)
        for node in tree.body
    )
    cases: dict[str, list[str]] = {}
    for prefix, function in _functions(tree):
        marks = [ast.unparse(mark) for mark in function.decorator_list]
        is_long = is_long_file or "pytest.mark.long" in marks
        gates = ["test-long"] if is_long else ["test"]
        if not is_long and any("marks=pytest.mark.long" in mark or "gated(" in mark for mark in marks):
            gates.append("test-long")  # some of its parameters
        for gate in gates:
            cases.setdefault(gate, []).append(prefix + function.name)
    return cases


def _functions(tree: ast.Module) -> list[tuple[str, ast.FunctionDef]]:
    found: list[tuple[str, ast.FunctionDef]] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found.append(("", node))
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            found += [(f"{node.name}::", part) for part in node.body if isinstance(part, ast.FunctionDef)]
    return [(prefix, function) for prefix, function in found if function.name.startswith("test")]


def _is_long(value: ast.AST) -> bool:
    return "pytest.mark.long" in ast.unparse(value)


def found() -> dict[str, dict[str, list[str]]]:
    """The cases of every test file, by its path from tests/."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return {path.relative_to(ROOT / "tests").as_posix(): cases_of(path) for path in files}


def listed() -> dict[str, dict[str, Any]]:
    """The list as it is written."""
    content: dict[str, dict[str, Any]] = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    return content


def main() -> None:
    old = listed() if LIST.exists() else {}
    new = {}
    for path, cases in found().items():
        docstring = ast.get_docstring(ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8"))) or ""
        sentence = old.get(path, {}).get("guarantee") or docstring.split("\n\n")[0].replace("\n", " ")
        new[path] = {"guarantee": sentence, **cases}
    text = yaml.safe_dump(new, allow_unicode=True, sort_keys=False, width=110)
    LIST.write_text(
        f"# What the tests promise, by file and gate. See tests/project/guarantees.py.\n{text}", "utf-8"
    )


if __name__ == "__main__":
    main()
