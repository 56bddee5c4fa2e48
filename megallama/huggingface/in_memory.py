"""A checkpoint as a model of transformers in memory: what `megallama export` writes, without the files."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers

from megallama.checkpoint.offline.reader import CheckpointReader
from megallama.config.rope_scaling import dynamic_theta
from megallama.config.schema import ModelConfig, RopeScaling
from megallama.host.dtypes import dtype_name
from megallama.huggingface.checkpoint_source import blocks, check_complete
from megallama.huggingface.config import hugging_face_config
from megallama.huggingface.names import hugging_face_tensors


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
