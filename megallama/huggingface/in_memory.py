"""A checkpoint as a model of transformers in memory, as `megallama export` would write it, and how it continues ids."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from transformers.generation import BaseStreamer

from megallama.checkpoint.offline.reader import CheckpointReader
from megallama.config.rope_scaling import dynamic_theta
from megallama.config.schema import ModelConfig, RopeScaling
from megallama.host.dtypes import dtype_name
from megallama.host.errors import UserError
from megallama.huggingface.checkpoint_source import blocks, check_complete
from megallama.huggingface.config import hugging_face_config
from megallama.huggingface.names import hugging_face_tensors

_LEAST_TEMPERATURE = 1e-6


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next tokens are chosen."""

    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability (Holtzman et al. 2020, arXiv:1904.09751)."""
    repetition_penalty: float = 1.0
    """Lowers the logits of tokens that the text has already (Keskar et al. 2019, arXiv:1909.05858); 1: no penalty."""
    beams: int = 1
    """Texts that beam search keeps, of which the likeliest is the result; it takes temperature 0."""
    seed: int = 0
    """Seed of the draw."""

    def check(self) -> None:
        """Raise UserError for values that make no sense."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(
                f"--temperature ({self.temperature}) must be 0 or more: 0 is greedy decoding,"
                " 1 samples from the model's distribution"
            )
        if 0 < self.temperature < _LEAST_TEMPERATURE:
            raise UserError(
                f"--temperature ({self.temperature}) must be 0, or {_LEAST_TEMPERATURE} at least: logits divided by"
                " less are no finite numbers; 0 takes the likeliest token"
            )
        if self.top_k < 0:
            raise UserError(
                f"--top-k ({self.top_k}) must not be negative: give 0 for all tokens,"
                " or the number of most likely tokens to keep"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p ({self.top_p}) must be in (0, 1]: 1 keeps all tokens")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UserError(
                f"--repetition-penalty ({self.repetition_penalty}) must be above 0: 1 is no penalty, 1.1 a usual one"
            )
        if self.beams < 1:
            raise UserError(f"--beams ({self.beams}) must be at least 1: 1 is no beam search")
        if self.beams > 1 and self.temperature > 0:
            raise UserError(
                f"--beams ({self.beams}) looks for the likeliest text, and --temperature ({self.temperature}) draws"
                " one: give --temperature 0, or no --beams"
            )


def load_in_memory(
    reader: CheckpointReader, model: ModelConfig, *, seq_len: int, dtype: torch.dtype
) -> transformers.PreTrainedModel:
    """The model of a checkpoint on the host, each weight once in memory, in `dtype`.

    Args:
        reader: The checkpoint.
        model: Its shape.
        seq_len: Length of the sequences that it was trained on: dynamic NTK keeps the base of this length, where
            transformers would change it as a text grows.
        dtype: Format of the weights and of what is computed.

    Raises:
        UserError: a damaged checkpoint.
    """
    check_complete(reader, model)
    if model.rope_scaling is RopeScaling.dynamic:
        theta = dynamic_theta(model, seq_len=seq_len)
        model = dataclasses.replace(model, rope_scaling=RopeScaling.none, rope_theta=theta)
    has_both = model.qkv_bias and model.qk_norm
    # Their only class with the norm has a bias of the output as well, which is zero then.
    family = dataclasses.replace(model, qkv_bias=False) if has_both else model
    settings = hugging_face_config(family, dtype=dtype_name(dtype), bos_id=None, eos_id=None)
    settings |= {"attention_bias": True} if has_both else {}
    config = transformers.AutoConfig.for_model(**settings)
    tensors = {}
    for name, made in hugging_face_tensors(model).items():
        tensors[name] = torch.empty(made.shape, dtype=dtype)
        row = 0
        for block in blocks(reader, made):
            tensors[name][row : row + len(block)] = block
            row += len(block)
    if has_both:
        for layer in range(model.num_layers):
            tensors[f"model.layers.{layer}.self_attn.o_proj.bias"] = torch.zeros(
                model.hidden_size, dtype=dtype
            )
    kind: Any = getattr(transformers, settings["architectures"][0])
    transformers.utils.logging.disable_progress_bar()
    loaded, report = kind.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return loaded.eval()


def continue_ids(
    network: transformers.PreTrainedModel,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    end_ids: Sequence[int],
    never: Sequence[int] = (),
    show: Callable[[int], None] | None = None,
) -> list[int]:
    """The new tokens after `ids`, without the one that ended the text.

    Args:
        network: The model.
        ids: What to continue.
        max_new_tokens: Most tokens to add.
        sampling: How they are chosen.
        end_ids: Tokens that end the text.
        never: Tokens that are not chosen.
        show: Given each new token as it is found; with beam search once all are.

    Raises:
        UserError: logits that are not finite.
    """
    new: list[int] = []

    def take(token: int) -> None:
        if token not in end_ids:
            new.append(token)
            if show is not None:
                show(token)

    device = next(network.parameters()).device
    prompt = torch.tensor([list(ids)], device=device)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": sampling.temperature > 0,
        "num_beams": sampling.beams,
        "repetition_penalty": float(sampling.repetition_penalty),
        "suppress_tokens": list(never) or None,
        "eos_token_id": list(end_ids),
        "pad_token_id": end_ids[0],
    }
    if sampling.temperature > 0:
        settings |= {
            "temperature": float(sampling.temperature),
            "top_k": sampling.top_k,
            "top_p": float(sampling.top_p),
        }
    is_streamed = sampling.beams == 1
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        generate: Any = network.generate
        found = generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=transformers.GenerationConfig(**settings),
            streamer=_Streamer(take) if is_streamed else None,
            logits_processor=[_refuse_not_finite],
        )
    if not is_streamed:
        for token in found[0, len(ids) :].tolist():
            take(token)
    return new


def _refuse_not_finite(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The `scores` [texts, ids] as they are; of NaN no token can be drawn, and the likeliest is none.

    Suppressed tokens have -inf, so only the largest is looked at, which NaN counts as.
    """
    if not scores.amax(-1).isfinite().all():
        raise UserError(
            f"the logits after {input_ids.shape[1]} tokens are not finite: the checkpoint holds NaN or infinite"
            " numbers, or they overflow in its format (fp16), or --repetition-penalty is extreme; take an earlier"
            " checkpoint, or one trained in bf16 or fp32"
        )
    return scores


class _Streamer(BaseStreamer):
    """Hands each new token on."""

    def __init__(self, take: Callable[[int], None]) -> None:
        self._take = take
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then one token at a time."""
        if self._has_prompt:
            for token in value.flatten().tolist():
                self._take(token)
        self._has_prompt = True

    def end(self) -> None:
        """Nothing is held back."""
