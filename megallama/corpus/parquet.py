"""Documents of Parquet files, a few rows at a time. Imports no torch: preparation workers load it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

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
    schema = reader.schema_arrow
    kind = schema.field(text_field).type if text_field in schema.names else None
    if kind is None or not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        have = ", ".join(f"{field.name}: {field.type}" for field in list(schema)[:8])
        raise UserError(
            f"file {file.path} has no column {text_field!r} of text (it has {have}): name the column with --text-field"
        )
    row = sum(reader.metadata.row_group(group).num_rows for group in range(first))
    try:
        for batch in reader.iter_batches(
            batch_size=_ROWS_AT_ONCE, row_groups=range(first, end), columns=[text_field], use_threads=False
        ):
            for value in batch.column(0):
                row += 1
                yield from _document(value, file, row=row, text_field=text_field)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(file, error) from error


def _document(
    value: pyarrow.StringScalar, file: CorpusFile, *, row: int, text_field: str
) -> Iterator[Document | Damage]:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        yield Damage(
            file.path, row, f"{file.path} row {row} is not UTF-8 ({error.reason}): correct or remove it"
        )
        return
    if text is None:
        yield Damage(
            file.path,
            row,
            f"{file.path} row {row} has no text in column {text_field!r}: correct or remove it",
        )
    elif surrogate_place(text) is not None:
        yield Damage(
            file.path, row, f"{file.path} row {row} holds half a surrogate pair: correct or remove it"
        )
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
