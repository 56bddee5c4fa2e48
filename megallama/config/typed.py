"""Conversion between plain values (mappings, lists, numbers, text) and the frozen dataclasses of the schema.

Conversion never guesses: a value that does not have the field's type is a problem with key, value and
expected type. All problems of a tree are collected before anything is raised.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

from omegaconf import MISSING

from megallama.config.names import field_types, unknown_key, unknown_part
from megallama.config.schema import SourceConfig

T = TypeVar("T")

_TRUE = ("true", "yes", "on")
_FALSE = ("false", "no", "off")


class _Mismatch(Exception):
    """A value does not have the expected type."""


@dataclasses.dataclass
class Problems:
    """What is wrong with a tree of values."""

    messages: list[str] = dataclasses.field(default_factory=list)
    """One message a problem, other than absence."""
    missing: list[str] = dataclasses.field(default_factory=list)
    """Keys of mandatory settings without a value."""


def build(cls: type[T], values: Any, *, problems: Problems, key: str = "", origin: str = "") -> T | None:
    """`cls` from a mapping of plain values; None when anything was wrong, which `problems` then says.

    Args:
        cls: A class of the schema.
        values: What was read.
        problems: Collects what is wrong.
        key: Dotted key of this section; empty for the root.
        origin: File that is read, for the message of an unknown key.
    """
    if isinstance(values, str) and cls is SourceConfig:
        values = {"path": values}
    if values is None and not key:
        values = {}
    if not isinstance(values, Mapping):
        problems.messages.append(
            f"{key} ({shown(values)}) must be a section of settings: write {key}.<setting>=<value>"
        )
        return None
    types_of = field_types(cls)
    for name in values:
        if name not in types_of:
            # A part of a list has names of its own; in which file the list stands is not known.
            problems.messages.append(
                unknown_part(key, str(name), names=field_types(cls))
                if "." in key
                else unknown_key(_join(key, str(name)), origin=origin)
            )
    arguments = {}
    is_whole = all(name in types_of for name in values)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name = _join(key, field.name)
        annotation = types_of[field.name]
        given = values[field.name] if field.name in values else _default(field)
        if given == "" and _default(field) == MISSING:
            given = MISSING
        value = _convert(annotation, given, key=name, problems=problems, origin=origin)
        if value is _WRONG:
            is_whole = False
        arguments[field.name] = value
    return cls(**arguments) if is_whole else None


def plain(value: Any) -> Any:
    """Mappings, lists, numbers and text of a schema object; `build` gives the same object back."""
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def defaults(cls: type[Any]) -> dict[str, Any]:
    """Plain tree of a class's default values; "???" stands where a value is mandatory."""
    tree = {}
    for field in dataclasses.fields(cls):
        annotation = field_types(cls)[field.name]
        is_section = dataclasses.is_dataclass(annotation)
        tree[field.name] = defaults(annotation) if is_section else plain(_default(field))
    return tree


def optional(cls: type[Any]) -> dict[str, Any]:
    """`defaults` of the settings that need not be given."""
    return {name: value for name, value in defaults(cls).items() if value != MISSING}


def shown(value: Any) -> str:
    """A plain value as the user would write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def type_name(annotation: Any) -> str:
    """How a type is called in messages and in the reference: "integer", "one of fp32, bf16", ..."""
    choices = _union(annotation)
    if choices is not None:
        return " or ".join("null" if choice is type(None) else type_name(choice) for choice in choices)
    if typing.get_origin(annotation) is list:
        item = typing.get_args(annotation)[0]
        if not dataclasses.is_dataclass(item):
            return f"list of {type_name(item)}"
        return f"list of {{{', '.join(field_types(typing.cast(Any, item)))}}}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return f"one of {', '.join(member.value for member in annotation)}"
    return {int: "integer", float: "number", bool: "true or false", str: "text"}[annotation]


class _Wrong(Enum):
    """Marks a value whose problem has been noted."""

    wrong = 0


_WRONG = _Wrong.wrong


def _convert(annotation: Any, value: Any, *, key: str, problems: Problems, origin: str) -> Any:
    if isinstance(value, str) and value == MISSING:
        problems.missing.append(key)
        return _WRONG
    if dataclasses.is_dataclass(annotation):
        section = build(typing.cast(Any, annotation), value, problems=problems, key=key, origin=origin)
        return _WRONG if section is None else section
    if typing.get_origin(annotation) is list and isinstance(value, (list, tuple)):
        item_type = typing.get_args(annotation)[0]
        items = [
            _convert(item_type, item, key=f"{key}.{i}", problems=problems, origin=origin)
            for i, item in enumerate(value)
        ]
        return _WRONG if any(item is _WRONG for item in items) else items
    try:
        return _scalar(annotation, value)
    except _Mismatch:
        problems.messages.append(
            f"{key} ({shown(value)}) has the wrong type: expected {type_name(annotation)}"
        )
        return _WRONG


def _scalar(annotation: Any, value: Any) -> Any:
    choices = _union(annotation)
    if choices is not None:
        if value is None and type(None) in choices:
            return None
        (inner,) = (choice for choice in choices if choice is not type(None))
        return _scalar(inner, value)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return _member(annotation, value)
    if annotation is bool:
        return _boolean(value)
    if annotation is int or annotation is float:
        return _number(annotation, value)
    if annotation is str and isinstance(value, (str, int, float)):
        # A folder may be called 7; YAML and Hydra take such text for a number.
        return str(value).lower() if isinstance(value, bool) else str(value)
    raise _Mismatch


def _member(enum: type[Enum], value: Any) -> Enum:
    # YAML 1.1 reads a bare "none" as text, but "off" and "on" as booleans; no member has such a name.
    try:
        return enum(value)
    except ValueError:
        raise _Mismatch from None


def _boolean(value: Any) -> bool:
    text = str(value).lower()
    if isinstance(value, (bool, str)) and text in _TRUE + _FALSE:
        return text in _TRUE
    raise _Mismatch


def _number(kind: type[int] | type[float], value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise _Mismatch
    if isinstance(value, str):
        # YAML 1.1 takes 1e-4 for text: it asks for a point and a sign.
        try:
            value = float(value) if not value.strip().lstrip("+-").isdecimal() else int(value)
        except ValueError:
            raise _Mismatch from None
    if kind is float:
        try:
            return float(value)
        except OverflowError:  # an integer of hundreds of digits
            raise _Mismatch from None
    # 1e5 is a float to YAML and to Hydra, and a natural way to write a number of steps.
    if isinstance(value, float) and not (math.isfinite(value) and value.is_integer()):
        raise _Mismatch
    return int(value)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    assert field.default_factory is not dataclasses.MISSING, field.name
    if dataclasses.is_dataclass(field.default_factory):
        return {}
    return field.default_factory()


def _union(annotation: Any) -> tuple[Any, ...] | None:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return None


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name
