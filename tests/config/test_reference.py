"""docs/configuration.md is what the schema says."""

from __future__ import annotations

import dataclasses

from megallama.config.names import field_types, setting_keys
from megallama.config.reference import PATH, field_docs, reference
from megallama.config.schema import RunConfig, SourceConfig


def test_committed_reference_is_current() -> None:
    assert PATH.read_text(encoding="utf-8") == reference(), "run `make docs`"


def test_every_setting_is_documented() -> None:
    for cls in (*field_types(RunConfig).values(), SourceConfig):
        docs = field_docs(cls)
        for field in dataclasses.fields(cls):
            assert docs.get(field.name, "").endswith("."), f"{cls.__name__}.{field.name} has no docstring"
    text = reference()
    for key in setting_keys():
        assert text.count(f"| `{key}` |") == 1
