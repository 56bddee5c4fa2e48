"""Writes docs/configuration.md from the schema: `python -m megallama.config.reference`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from megallama.config.names import field_types
from megallama.config.schema import RunConfig, SourceConfig
from megallama.config.typed import defaults, shown, type_name

PATH = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

Generated from `megallama/config/schema.py` by `make docs`; edit the strings there, not this file.

A run is configured on the command line. An argument is a setting (`section.setting=value`), a model shape
(`model=<name>`, a file of `conf/model/`) or a complete run (`+exp=<name>`, a file of `conf/exp/`). If a setting is
given more than once, the last value counts. Relative paths are relative to the current directory. `--cfg job` prints
the resulting configuration; the run folder keeps it as `config.yaml`. `--multirun` with several values of a setting
starts several runs, one after another:

    megallama train --nproc-per-node 8 +exp=llama2_7b parallel.tp=8 optim.lr=1e-4
    megallama train --multirun +exp=demo optim.lr=1e-3,3e-3
"""


def field_docs(cls: type[Any]) -> dict[str, str]:
    """The string below each field of a schema class, on one line."""
    (tree,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(following, ast.Expr):
            continue
        if isinstance(statement.target, ast.Name) and isinstance(following.value, ast.Constant):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def reference() -> str:
    """The whole text of docs/configuration.md."""
    parts = [INTRODUCTION]
    for section, section_type in field_types(RunConfig).items():
        parts.append("\n".join(_section(section, section_type)))
    parts.append("\n".join(_section("data.sources[]", SourceConfig)))
    return "\n".join(parts)


def _section(title: str, cls: type[Any]) -> Iterator[str]:
    yield f"## {title}\n"
    yield f"{inspect.getdoc(cls)}\n"
    yield "| setting | type | default | meaning |"
    yield "| --- | --- | --- | --- |"
    docs = field_docs(cls)
    default_values = defaults(cls)
    for name, annotation in field_types(cls).items():
        value = default_values[name]
        default = "must be given" if value == MISSING else f"`{_default_text(value)}`"
        key = name if title.endswith("[]") else f"{title}.{name}"
        yield f"| `{key}` | {_cell(_type_text(annotation))} | {default} | {_cell(docs[name])} |"
    yield ""


def _type_text(annotation: Any) -> str:
    if typing.get_origin(annotation) is list and dataclasses.is_dataclass(typing.get_args(annotation)[0]):
        return "list, see below"
    return type_name(annotation)


def _default_text(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Write the file."""
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(reference(), encoding="utf-8")
    print(f"wrote {PATH}")


if __name__ == "__main__":
    main()
