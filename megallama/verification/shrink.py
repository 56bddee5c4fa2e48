"""Shrinks a model for verification: its structure is kept, its widths are not.

Kept: heads per key/value head, how heads divide over tp and over ulysses' ranks, ties, rotary scaling,
recomputation, masks, precision, kernels, optimizer, padding of the vocabulary (or none), ZeRO stage. Shrunk:
layers, widths, vocabulary, sequence, batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum

from megallama.config.rope_scaling import SETTINGS
from megallama.config.schema import ContextKind, RunConfig, Schedule
from megallama.verification.layouts import Layout, change

HEAD_DIM = 8
HIDDEN_SIZE = 64
MIN_ADAM_EPS = 1e-6
"""Adam's usual 1e-8 turns rounding in near-zero gradients into full-size updates, which no comparison survives."""
LR = 1e-3
"""Large enough for a few steps to move the weights by more than rounding."""


def shrink(config: RunConfig, layouts: Sequence[Layout], *, steps: int) -> RunConfig:
    """The one small run that all `layouts` can cut; the layouts themselves are applied to it afterwards."""
    cuts = [layout.apply(config) for layout in layouts]
    tps, cps = [cut.parallel.tp for cut in cuts], [cut.parallel.cp for cut in cuts]
    width = math.lcm(*tps)
    model = config.model
    kv_heads = _kv_heads(config, cuts)
    heads = kv_heads * (model.num_heads // model.kv_heads)
    vocab_multiple = 16 * width
    is_padded = model.vocab_size % model.vocab_multiple != 0
    vocab_size = 4 * vocab_multiple - (5 if is_padded else 0)
    # Whole zigzag chunks for every cp, of whole sequence-parallel parts.
    seq_len = math.lcm(*(2 * cp * tp for cp, tp in zip(cps, tps, strict=True)))
    seq_len *= -(-32 // seq_len)
    micro = math.lcm(
        *(layout.dp * cut.train.micro_batch_size for layout, cut in zip(layouts, cuts, strict=True))
    )
    # Twice as many micro-batches as stages: a pipeline is filled, runs steadily, and drains.
    batch = max(
        2 * cut.parallel.pp * layout.dp * cut.train.micro_batch_size
        for layout, cut in zip(layouts, cuts, strict=True)
    )
    sizes = {
        "model.name": f"{model.name} (shrunk)",
        "model.num_layers": _num_layers(config, cuts),
        "model.hidden_size": HIDDEN_SIZE,
        "model.head_dim": HEAD_DIM,
        "model.num_heads": heads,
        "model.num_kv_heads": None if model.num_kv_heads is None else kv_heads,
        "model.ffn_hidden_size": width
        * max(1, round(HIDDEN_SIZE * model.ffn_hidden_size / model.hidden_size / width)),
        "model.vocab_multiple": vocab_multiple,
        "model.vocab_size": vocab_size,
        "model.max_seq_len": seq_len,
        "train.seq_len": seq_len,
        "train.global_batch_size": micro * -(-batch // micro),
        "train.steps": steps,
        "optim.lr": LR,
        "optim.eps": max(config.optim.eps, MIN_ADAM_EPS),
        "optim.warmup_steps": min(config.optim.warmup_steps, steps - 1, 2),
        "optim.decay_steps": min(config.optim.decay_steps, 1),
        "checkpoint.interval": 0,
        "eval.interval": 0,
        "log.tensorboard": False,
        "log.wandb": "disabled",
        "data.tokenizer": None,
        "data.validation": [],
        "data.schedule": [],
        "train.init_from": None,
        **_gpu_kernels(config),
        **_partial_training(config, vocab_size=vocab_size, steps=steps),
    }
    if config.optim.schedule == Schedule.wsd:
        sizes["optim.decay_steps"] = min(max(1, config.optim.decay_steps), steps - 1)
        sizes["optim.warmup_steps"] = 0
    if "rope_original_max_seq_len" in SETTINGS[model.rope_scaling]:
        # Wavelengths fall on both sides of the change, as in the large model.
        sizes["model.rope_original_max_seq_len"] = seq_len // 2
    else:
        sizes["model.rope_original_max_seq_len"] = seq_len
    return change(config, sizes)


def _gpu_kernels(config: RunConfig) -> dict[str, object]:
    """What no CPU can run gives way to what can."""
    chosen: dict[str, Enum] = {
        "kernels.attention": config.kernels.attention,
        "kernels.norm": config.kernels.norm,
        "kernels.adam": config.kernels.adam,
    }
    return {key: "auto" for key, kernel in chosen.items() if kernel.value in ("te", "apex")}


def _partial_training(config: RunConfig, *, vocab_size: int, steps: int) -> dict[str, object]:
    """Partial training for the first half of the steps, with some rows old and some new."""
    optim = config.optim
    sizes: dict[str, object] = {"optim.partial_steps": min(optim.partial_steps, max(1, steps // 2))}
    if optim.partial_rows_from is not None:
        sizes["optim.partial_rows_from"] = vocab_size // 2
    return sizes


def _kv_heads(config: RunConfig, cuts: Sequence[RunConfig]) -> int:
    """The fewest key/value heads that divide over each tp (or are shared by its ranks) as the many do.

    Under ulysses they must do so over tp x cp, and the query heads that belong to them must divide over it.
    """
    kv_heads = config.model.kv_heads
    ratio = config.model.num_heads // kv_heads
    tps = [cut.parallel.tp for cut in cuts]
    exchanges = [
        cut.parallel.tp * cut.parallel.cp for cut in cuts if cut.parallel.cp_kind == ContextKind.ulysses
    ]
    for fewer in (d for d in range(1, kv_heads + 1) if kv_heads % d == 0):
        divides_alike = all((fewer % n == 0) == (kv_heads % n == 0) for n in (*tps, *exchanges))
        is_shared = all(fewer % tp == 0 or tp % fewer == 0 for tp in tps)
        if divides_alike and is_shared and all(fewer * ratio % n == 0 for n in exchanges):
            return fewer
    return kv_heads


def _num_layers(config: RunConfig, cuts: Sequence[RunConfig]) -> int:
    given = [sum(cut.parallel.layers_per_stage) for cut in cuts if cut.parallel.layers_per_stage]
    if given:
        return max(given)
    chunks = math.lcm(*(cut.parallel.pp * cut.parallel.vp for cut in cuts))
    return max(2, chunks)
