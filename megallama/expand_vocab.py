"""Adds rows for new tokens to the embedding and output layer of a checkpoint, in one process."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from megallama.checkpoint.format.disk import writing
from megallama.checkpoint.format.integrity import intact_checkpoint
from megallama.checkpoint.format.model_identity import model_identity, model_of_identity
from megallama.checkpoint.format.protocol import find_checkpoints
from megallama.checkpoint.offline.reader import CheckpointReader
from megallama.checkpoint.offline.writer import CheckpointWriter
from megallama.config.schema import ModelConfig
from megallama.grid import padded_vocab_size
from megallama.host.dtypes import dtype_name
from megallama.host.errors import UserError
from megallama.huggingface.checkpoint_source import (
    format_of_checkpoint,
    model_of_checkpoint,
    trained_model,
    write_shape,
)
from megallama.huggingface.model_folder import (
    CONFIG_FILE,
    GENERATION_FILE,
    IGNORED_FILE,
    KEPT_FOLDER,
    copy_files,
    read_json,
    write_json,
)
from megallama.model.build import EMBEDDING, OUTPUT
from megallama.tokenizers.files import copy_tokenizer
from megallama.tokenizers.load import Tokenizer, load_tokenizer
from megallama.trainer.run_folder import RunFolder

log = logging.getLogger(__name__)

Init = Literal["mean", "zeros", "normal"]
"""What a new row is: the mean of the rows that its text had before, zeros, or a draw with mean and spread of all."""

_BLOCK_ELEMENTS = 1 << 28
"""Elements of a table in memory at once (1 GiB of fp32): larger ones are worked on by columns."""


@dataclass(frozen=True)
class ExpansionReport:
    """What an expansion wrote."""

    checkpoint: Path
    """The new checkpoint: weights only."""
    tokenizer: Path
    """Copy of the new tokenizer beside it."""
    old_vocab_size: int
    new_vocab_size: int
    rows: tuple[int, int]
    """Rows of the tables before and after, padding included."""
    pieces_per_token: float
    """Old tokens that a new one stands for, on average."""


def expand_vocab(
    source: str | Path,
    output: str | Path,
    *,
    tokenizer: str | Path,
    old_tokenizer: str | Path | None = None,
    init: Init = "mean",
    seed: int = 1234,
) -> ExpansionReport:
    """Writes `<output>/checkpoints/step-00000000`, which `train.init_from=<output>` starts from.

    The rows of old tokens are copied bit for bit. New tokens are the ids from the old tokenizer's size on. Padding
    rows become the mean of the old padding rows, which have learnt to stay out of the way, or else of all rows.

    Args:
        source: A checkpoint or a run folder, whose newest intact checkpoint is taken.
        output: A folder without checkpoints.
        tokenizer: The new tokenizer, in which every old id means what it did.
        old_tokenizer: The tokenizer of the checkpoint; by default the one that the run folder holds.
        init: What new rows are; `mean` of the old tokens of the new token's text.
        seed: Seed of `init="normal"`.

    Raises:
        UserError: no intact checkpoint, tokenizers that do not fit it or each other, an output that exists.
    """
    if init not in get_args(Init):
        raise UserError(f"init ({init!r}) is unknown: use {', '.join(get_args(Init))}")
    target = RunFolder(Path(output))
    if find_checkpoints(target.checkpoints):
        raise UserError(f"output {output} holds checkpoints already: choose another folder")
    checkpoint = intact_checkpoint(Path(source), log=log.warning)
    reader = CheckpointReader(checkpoint, verify="never")
    run = checkpoint.absolute().parent.parent
    trained = trained_model(run)
    new, old = load_tokenizer(tokenizer), load_tokenizer(old_tokenizer or _own_tokenizer(Path(source)))
    model = model_of_identity(reader.model, name="expanded", max_seq_len=1)
    _check_fit(old, new, vocab_size=model.vocab_size)
    grown = dataclasses.replace(model, vocab_size=new.vocab_size)
    rows = padded_vocab_size(new.vocab_size, multiple=model.vocab_multiple)
    parents = list(_parents(old, new))
    tables = [name for name in (EMBEDDING, OUTPUT) if name in reader.names()]
    old_rows = reader.shape(f"fp32/{EMBEDDING}")[0]
    added_bytes = sum(4 * (rows - old_rows) * reader.shape(f"fp32/{name}")[1] for name in tables)
    weights_bytes = sum(4 * math.prod(reader.shape(f"fp32/{name}")) for name in reader.names())
    origin = {"old_vocab_size": old.vocab_size, "step": reader.step, "init": init}
    with CheckpointWriter(
        target.checkpoints,
        step=0,
        model=model_identity(grown),
        state={
            "expanded": origin,
            "source": {"dtype": dtype_name(format_of_checkpoint(reader, trained))},
        },
        size_bytes=weights_bytes + added_bytes,
    ) as writer:
        for name in reader.names():
            if name in tables:
                _write_table(reader, writer, name, old=old, parents=parents, rows=rows, init=init, seed=seed)
            else:
                writer.write(f"fp32/{name}", reader.read(f"fp32/{name}").float())
    if trained is not None:
        _describe(target, model_of_checkpoint(reader, trained), run, vocab_size=new.vocab_size)
    return ExpansionReport(
        checkpoint=writer.path,
        tokenizer=_copy_tokenizer(new, target),
        old_vocab_size=old.vocab_size,
        new_vocab_size=new.vocab_size,
        rows=(old_rows, rows),
        pieces_per_token=sum(map(len, parents)) / len(parents),
    )


def _own_tokenizer(source: Path) -> Path:
    for folder in (source, source.parent, source.parent.parent):  # a run, its checkpoints, one of them
        found = RunFolder(folder).tokenizer_file()
        if found is not None:
            return found
    raise UserError(
        f"there is no tokenizer beside {source}: name the tokenizer of the checkpoint with --old-tokenizer"
    )


def _check_fit(old: Tokenizer, new: Tokenizer, *, vocab_size: int) -> None:
    if old.vocab_size > vocab_size:
        raise UserError(
            f"old tokenizer {old.path} has more ids ({old.vocab_size}) than the checkpoint ({vocab_size}):"
            " give the tokenizer that the checkpoint was trained with"
        )
    if new.vocab_size <= max(old.vocab_size, vocab_size - 1):
        raise UserError(
            f"new tokenizer {new.path} ({new.vocab_size} ids) adds nothing to the {vocab_size} ids of the checkpoint"
            f" and the {old.vocab_size} of {old.path}: give a merged tokenizer (megallama tokenizer merge)"
        )
    for token in range(old.vocab_size):
        if (old.kind(token), old.surface(token)) != (new.kind(token), new.surface(token)):
            raise UserError(
                f"id {token} is {old.label(token)!r} in {old.path} and {new.label(token)!r} in {new.path}:"
                " the new tokenizer must keep every old id (megallama tokenizer merge does)"
            )


def _parents(old: Tokenizer, new: Tokenizer) -> Iterator[list[int]]:
    """For each new token the old tokens of its text; for one without text, all old tokens."""
    everything = list(range(old.vocab_size))
    for token in range(old.vocab_size, new.vocab_size):
        surface = new.surface(token)
        yield (old.split(surface) if surface else []) or everything


def _write_table(
    reader: CheckpointReader,
    writer: CheckpointWriter,
    name: str,
    *,
    old: Tokenizer,
    parents: Sequence[list[int]],
    rows: int,
    init: Init,
    seed: int,
) -> None:
    key = f"fp32/{name}"
    old_rows, width = reader.shape(key)
    step = max(1, min(width, _BLOCK_ELEMENTS // rows))
    for first in range(0, width, step):
        columns = min(step, width - first)
        stored = reader.read(key, offset=(0, first), shape=(old_rows, columns)).float()
        known, padding = stored[: old.vocab_size], stored[old.vocab_size :]
        grown = torch.empty(rows, columns)
        grown[: old.vocab_size] = known
        end = old.vocab_size + len(parents)
        generator = torch.Generator().manual_seed(_seed(seed, name, first))
        grown[old.vocab_size : end] = _new_rows(known, parents, init=init, generator=generator)
        grown[end:] = (padding if len(padding) else known).mean(0)
        for row in range(0, rows, 4096):
            part = grown[row : row + 4096]
            writer.write_box(key, part.contiguous(), offset=(row, first), whole=(rows, width))


def _new_rows(
    known: torch.Tensor, parents: Sequence[list[int]], *, init: Init, generator: torch.Generator
) -> torch.Tensor:
    if init == "zeros":
        return torch.zeros(len(parents), known.shape[1])
    if init == "normal":
        noise = torch.randn(len(parents), known.shape[1], generator=generator)
        return noise * known.std(0, correction=0) + known.mean(0)
    ends = torch.tensor([0, *map(len, parents)]).cumsum(0)[:-1]
    ids = torch.tensor([token for tokens in parents for token in tokens])
    return torch.nn.functional.embedding_bag(ids, known, ends, mode="mean")


def _seed(seed: int, name: str, column: int) -> int:
    digest = hashlib.blake2b(f"{seed}/expand/{name}/{column}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _describe(target: RunFolder, old: ModelConfig, run: Path, *, vocab_size: int) -> None:
    """What `generate` and `export` ask beside the checkpoint: its shape, and an imported model's config.json."""
    shape = dataclasses.replace(old, name=f"{old.name}_{vocab_size}", vocab_size=vocab_size)
    kept, own = run / KEPT_FOLDER, target.path / KEPT_FOLDER
    with writing(target.path, needed_bytes=0):
        write_shape(target.path, shape)
        if (kept / CONFIG_FILE).is_file():
            copy_files(kept, own, (GENERATION_FILE, IGNORED_FILE))
            own.mkdir(exist_ok=True)
            write_json(own / CONFIG_FILE, {**read_json(kept / CONFIG_FILE), "vocab_size": vocab_size})


def _copy_tokenizer(tokenizer: Tokenizer, target: RunFolder) -> Path:
    try:
        return copy_tokenizer(tokenizer.path, target.tokenizer_folder)
    except OSError as error:
        raise UserError(
            f"tokenizer cannot be copied to {target.tokenizer_folder} ({error}): copy it"
        ) from error
