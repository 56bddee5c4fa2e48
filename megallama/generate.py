"""Text generation from a run folder, an import or a grown vocabulary, in one process, by transformers."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megallama.checkpoint.format.integrity import latest_checkpoint
from megallama.checkpoint.offline.reader import CheckpointReader
from megallama.config.schema import ModelConfig
from megallama.host.errors import UserError
from megallama.host.launch import refuse_several
from megallama.huggingface.checkpoint_source import (
    format_of_checkpoint,
    model_of_checkpoint,
    trained_model,
)
from megallama.huggingface.in_memory import Sampling, continue_ids, load_in_memory
from megallama.huggingface.model_folder import kept_end_ids
from megallama.huggingface.tokenizer.run_data import begin_of_run
from megallama.tokenizers.begin import Begin, begin_token
from megallama.tokenizers.files import HUGGING_FACE_FILE, SENTENCEPIECE_FILE
from megallama.tokenizers.load import Tokenizer, load_tokenizer
from megallama.trainer.run_folder import RunFolder

log = logging.getLogger(__name__)

_BROKEN = "\ufffd"
"""What a character decodes to whose bytes are not all there."""


@dataclasses.dataclass(frozen=True)
class Generator:
    """A model in memory that continues token ids."""

    model: ModelConfig
    network: Any
    """The same as a model of transformers."""
    tokenizer: Tokenizer
    end_ids: tuple[int, ...]
    """Tokens that end a text."""
    seq_len: int
    """Length of the sequences that it was trained on."""

    def continue_ids(
        self,
        ids: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        show: Callable[[int], None] | None = None,
    ) -> list[int]:
        """The new tokens after `ids`, without the one that ended the text; `show` is given each as it is found.

        Ids beyond the tokenizer are never drawn: they are padding, or spare ones that it cannot show. Beam search
        calls `show` once it is over.
        """
        return continue_ids(
            self.network,
            ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            end_ids=self.end_ids,
            never=range(self.tokenizer.vocab_size, self.model.vocab_size),
            show=show,
        )


def open_generator(run_dir: Path) -> Generator:
    """The whole model of the newest checkpoint of `run_dir` that verifies, with its tokenizer.

    Raises:
        UserError: the folder holds no model of ours, no checkpoint or no tokenizer.
    """
    folder = RunFolder(run_dir)
    trained = trained_model(run_dir)
    if trained is None:
        raise UserError(
            f"{run_dir} is not a run folder (no config.yaml): give the train.run_dir of a run, or a folder that"
            " `megallama import` or `megallama expand-vocab` made"
        )
    tokenizer_file = folder.tokenizer_file()
    if tokenizer_file is None:
        remedy = (
            "set data.tokenizer in the run and continue it"
            if folder.config_file.is_file()
            else f"copy the model's {SENTENCEPIECE_FILE} or {HUGGING_FACE_FILE} to {folder.tokenizer_folder}"
        )
        raise UserError(f"{run_dir} holds no tokenizer: {remedy}")
    tokenizer = load_tokenizer(tokenizer_file)
    checkpoint = latest_checkpoint(folder.checkpoints, log=log.warning)
    if checkpoint is None:
        raise UserError(
            f"{folder.checkpoints} holds no usable checkpoint: train for at least one checkpoint.interval"
        )
    reader = CheckpointReader(checkpoint, verify="never")
    model = model_of_checkpoint(reader, trained)
    network = load_in_memory(
        reader, model, seq_len=trained.seq_len, dtype=format_of_checkpoint(reader, trained)
    )
    if torch.cuda.is_available():
        network.to("cuda")
    ends = [tokenizer.eod_id, *kept_end_ids(run_dir)]
    return Generator(model, network, tokenizer, tuple(dict.fromkeys(ends)), trained.seq_len)


def generate(
    run_dir: Path,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    sampling: Sampling | None = None,
    begin: Begin | None = None,
    show: Callable[[str], None] = lambda part: None,
) -> str:
    """Text that continues `prompt`; `show` is given the same in parts, as characters become whole.

    Args:
        run_dir: Folder of a run, an import or a grown vocabulary.
        prompt: What to continue.
        max_new_tokens: Most tokens to add; the text may end before.
        sampling: How tokens are chosen.
        begin: Whether the begin token stands before the prompt. None: as in the run's data, if they are still there,
            else as the tokenizer's files say.
        show: Called with an empty part first, when all that can be wrong has been looked at.

    Raises:
        UserError: as `open_generator`; senseless settings; a prompt that the model has no ids for.
    """
    refuse_several("megallama generate")
    sampling = sampling or Sampling()
    sampling.check()
    if max_new_tokens < 1:
        raise UserError(
            f"--max-new-tokens ({max_new_tokens}) must be at least 1: give how many tokens to add"
        )
    generator = open_generator(run_dir)
    tokenizer = generator.tokenizer
    first = begin_of_run(run_dir, tokenizer) if begin is None else begin_token(tokenizer, begin)
    ids = [*([] if first is None else [first]), *tokenizer.encode(prompt)] or [tokenizer.eod_id]
    if max(ids) >= generator.model.vocab_size:
        raise UserError(
            f"the prompt has token {max(ids)} of {tokenizer.path}, and the model has {generator.model.vocab_size}"
            " ids: put the model's own tokenizer there, or grow the model with megallama expand-vocab"
        )
    if len(ids) + max_new_tokens > generator.seq_len:
        log.warning(
            "%d tokens of prompt and %d new ones are more than the %d of a training sequence: the end may be worse",
            *(len(ids), max_new_tokens, generator.seq_len),
        )
    show("")
    given = tokenizer.decode(ids)
    shown, all_ids = given, list(ids)

    def show_token(token: int) -> None:
        nonlocal shown
        all_ids.append(token)
        # A character of several byte tokens (Chinese, often) is broken until it is complete.
        text = tokenizer.decode(all_ids).rstrip(_BROKEN)
        if len(text) > len(shown):
            show(text[len(shown) :])
            shown = text

    generator.continue_ids(ids, max_new_tokens=max_new_tokens, sampling=sampling, show=show_token)
    text = tokenizer.decode(all_ids)
    if len(text) > len(shown):
        show(text[len(shown) :])
    return text[len(given) :]
