"""Documents of Parquet files, a few rows at a time. Imports no torch: preparation workers load it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from megallama.corpus.documents import Damage, Document, surrogate_place
from megallama.corpus.files import CorpusFile, open_file
from megallama.host.errors import UserError

_ROWS_AT_ONCE = 256


def cut_row_groups(file: CorpusFile, *, stretch_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(first row group, end, bytes) of stretches of whole row groups; `stretch_bytes` counts packed bytes.

    Raises:
        UserError: the file is damaged.
    """
    with open_file(file.path) as stream:
        metadata = _open(stream, file).metadata
    first, size = 0, 0
    for group in range(metadata.num_row_groups):
        size += sum(
            metadata.row_group(group).column(i).total_compressed_size for i in range(metadata.num_columns)
        )
        if size >= stretch_bytes:
            yield first, group + 1, size
            first, size = group + 1, 0
    if first < metadata.num_row_groups:
        yield first, metadata.num_row_groups, size


def read_rows(
    stream: IO[bytes], file: CorpusFile, *, first: int, end: int, text_field: str
) -> Iterator[Document | Damage]:
    """The texts of row groups [first, end); empty ones are left out.

    Raises:
        UserError: the file is damaged, or has no column `text_field` of text.
    """
    reader = _open(stream, file)
    column, inside = _column_of_text(reader.schema_arrow, file, text_field)
    row = sum(reader.metadata.row_group(group).num_rows for group in range(first))
    try:
        for batch in reader.iter_batches(
            batch_size=_ROWS_AT_ONCE,
            row_groups=range(first, end),
            columns=[".".join((column, *inside))],
            use_threads=False,
        ):
            for value in batch.column(column):
                row += 1
                yield from _document(value, inside, file, row=row, text_field=text_field)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(file, error) from error


def _column_of_text(schema: pyarrow.Schema, file: CorpusFile, text_field: str) -> tuple[str, list[str]]:
    """The column that `text_field` means, a column of that very name or one with fields inside, and their names."""
    column, inside = text_field, list[str]()
    if text_field not in schema.names:
        column, *inside = text_field.split(".")
    kind: Any = schema.field(column).type if column in schema.names else None
    for name in inside:
        is_struct = kind is not None and pyarrow.types.is_struct(kind)
        kind = kind.field(name).type if is_struct and kind.get_field_index(name) >= 0 else None
    if kind is None or not _is_text(kind):
        have = ", ".join(f"{field.name}: {field.type}" for field in list(schema)[:8])
        what = (
            f"no column {text_field!r} of text"
            if kind is None
            else f"no text in column {text_field!r} ({kind})"
        )
        raise UserError(
            f"file {file.path} has {what} (it has {have}): name the column with --text-field, a field inside a struct"
            " as column.field"
        )
    return column, inside


def _is_text(kind: pyarrow.DataType) -> bool:
    """Whether values of this type are text: strings, and bytes that are UTF-8, however they are stored."""
    types = pyarrow.types
    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    is_string = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return is_string or types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _document(
    value: pyarrow.Scalar, inside: list[str], file: CorpusFile, *, row: int, text_field: str
) -> Iterator[Document | Damage]:
    place = f"{file.path} row {row}"
    try:
        text = value.as_py()
        for name in inside:
            text = None if text is None else text[name]
        if isinstance(text, bytes):
            text = text.decode("utf-8")
    except UnicodeDecodeError as error:
        yield Damage(file.path, row, f"{place} is not UTF-8 ({error.reason}): correct or remove it")
        return
    if text is None:
        yield Damage(file.path, row, f"{place} has no text in column {text_field!r}: correct or remove it")
    elif surrogate_place(text) is not None:
        yield Damage(file.path, row, f"{place} holds half a surrogate pair: correct or remove it")
    elif text:
        yield Document(text=text, key=f"{file.relative}:{row - 1}", place=row - 1)


def _open(stream: IO[bytes], file: CorpusFile) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(stream)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(file, error) from error


def _damaged(file: CorpusFile, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"file {file.path} is not a valid Parquet file ({reason}): copy it again or leave it out"
    )
