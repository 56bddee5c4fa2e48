"""No guarantee is lost in silence: the list of guarantees names every case that holds one, and its gate."""

from __future__ import annotations

import pytest

from tests.project.guarantees import cases_of, found, listed


def test_every_guarantee_has_the_cases_that_hold_it():
    wanted = {
        path: {gate: cases for gate, cases in entry.items() if gate != "guarantee"}
        for path, entry in listed().items()
    }
    assert found() == wanted, "a case is gone, new or in another gate: python -m tests.project.guarantees"


def test_every_file_says_what_it_guarantees():
    silent = [path for path, entry in listed().items() if len(entry["guarantee"].split()) < 3]
    assert silent == []


@pytest.mark.parametrize(
    ("source", "cases"),
    [
        ("def test_a(): pass\ndef helper(): pass", {"test": ["test_a"]}),
        (
            "@pytest.mark.long\ndef test_a(): pass\ndef test_b(): pass",
            {"test-long": ["test_a"], "test": ["test_b"]},
        ),
        (
            "pytestmark = [pytest.mark.long]\nclass TestX:\n    def test_a(self): pass",
            {"test-long": ["TestX::test_a"]},
        ),
        (
            "@pytest.mark.parametrize('x', [1, pytest.param(2, marks=pytest.mark.long)])\ndef test_a(x): pass",
            {"test": ["test_a"], "test-long": ["test_a"]},
        ),
    ],
)
def test_gates_are_told_apart(source, cases, tmp_path):
    path = tmp_path / "test_x.py"
    path.write_text(source)
    assert cases_of(path) == cases
