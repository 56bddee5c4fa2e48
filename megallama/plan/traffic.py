"""Predicts the bytes that a rank moves in one step: the formulas of docs/parallelism.md.

A call counts with its larger buffer: what all_gather gives, what reduce_scatter takes, what all_reduce, broadcast
and send are given. On a ring of n ranks an all_reduce moves 2 (n - 1) / n of that over the wire, all_gather and
reduce_scatter (n - 1) / n. `metrics/traffic_meter.py` measures the same; a test holds the two equal byte for byte.

Letters: S positions of a rank's part of a sequence, B sequences of a micro-batch, H hidden width, m micro-batches.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from megallama.config.schema import ContextKind, Dtype, Recompute, RunConfig
from megallama.grid import Coordinates, Grid, num_micro_batches, padded_vocab_size, split_layers
from megallama.host.errors import UserError

Traffic = dict[tuple[str, str, str], int]
"""(group, operation, format) -> bytes."""

ITEM_BYTES = {kind.full_name: kind.itemsize for kind in Dtype}

ALIGNMENT = 2
"""DeepSpeed pads the flat buffer of a parameter group to a multiple of this times the ranks that share it."""


@dataclass(frozen=True)
class _Holding:
    """What a rank holds of the model."""

    layers: int
    layers_again: int
    """Layers whose forward runs again in the backward pass."""
    is_first: bool
    is_last: bool
    matrices: list[int]
    """Elements of each local matrix (weight decay group)."""
    norms: list[int]
    """Elements of each norm weight."""
    head_norms: list[int]
    """Elements of each norm weight of query and key heads."""
    biases: list[int]
    """Elements of each local bias."""

    @property
    def vectors(self) -> list[int]:
        """Elements of each local vector (no weight decay)."""
        return self.norms + self.head_norms + self.biases


def step_traffic(config: RunConfig, *, grid: Grid, place: Coordinates) -> Traffic:
    """Bytes of one optimizer step of the rank at `place`; a step that fp16 skips gathers no parameters.

    Raises:
        UserError: ZeRO 3 with stages, which has no formula.
    """
    if config.zero.stage == 3 and grid.pp > 1:
        raise UserError(
            f"zero.stage (3) with parallel.pp ({grid.pp}) has no traffic formula: DeepSpeed keeps or drops a weight by"
            " what it recorded of earlier micro-batches; measure it with log.traffic=true"
        )
    holding = _holding(config, grid, place)
    micro_batches = num_micro_batches(
        config.train.global_batch_size, micro_batch_size=config.train.micro_batch_size, dp=grid.dp
    )
    traffic: Counter[tuple[str, str, str]] = Counter()
    _add_tensor_parallel(traffic, config, grid, holding, micro_batches)
    _add_context_parallel(traffic, config, grid, holding, micro_batches)
    _add_pipeline(traffic, config, grid, place, micro_batches)
    _add_zero(traffic, config, grid, holding, micro_batches)
    _add_ties(traffic, config, grid, place)
    return {key: count for key, count in traffic.items() if count}


def _holding(config: RunConfig, grid: Grid, place: Coordinates) -> _Holding:
    model, parallel = config.model, config.parallel
    stages = parallel.layers_per_stage or split_layers(model.num_layers, grid.pp * parallel.vp)
    chunks = stages[place.pp :: grid.pp]
    layers = sum(chunks)
    is_first, is_last = place.pp == 0, place.pp == grid.pp - 1
    query, fused = model.query_width, model.qkv_width
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    matrices = [fused * hidden, query * hidden, 2 * ffn * hidden, ffn * hidden] * layers
    rows = padded_vocab_size(model.vocab_size, multiple=model.vocab_multiple)
    # A tied copy on the last stage is no parameter.
    tables = int(is_first) + int(is_last and not model.tie_embeddings)
    return _Holding(
        layers=layers,
        layers_again=sum(_layers_again(config, chunk) for chunk in chunks),
        is_first=is_first,
        is_last=is_last,
        matrices=[size // grid.tp for size in matrices + [rows * hidden] * tables],
        norms=[hidden] * (2 * layers + int(is_last)),
        head_norms=[model.head_width] * (2 * layers * int(model.qk_norm)),
        biases=[fused // grid.tp] * (layers * int(model.qkv_bias)),
    )


def _layers_again(config: RunConfig, layers: int) -> int:
    """Of the layers of one chunk, those that `recompute=full` runs again."""
    train = config.train
    if train.recompute != Recompute.full:
        return 0
    return layers if train.recompute_layers is None else min(layers, train.recompute_layers)


def activation_bytes(config: RunConfig) -> int:
    """S x B x H in the format of the activations: the output of a layer for one micro-batch."""
    train = config.train
    elements = train.seq_len // config.parallel.cp * train.micro_batch_size * config.model.hidden_size
    return elements * config.precision.dtype.itemsize


def _wide(config: RunConfig) -> str:
    return "float64" if config.precision.dtype == Dtype.fp64 else "float32"


def _add_tensor_parallel(
    traffic: Counter[tuple[str, str, str]], config: RunConfig, grid: Grid, holding: _Holding, m: int
) -> None:
    if grid.tp == 1:
        return
    layers, first, last = holding.layers, int(holding.is_first), int(holding.is_last)
    again = holding.layers_again
    dtype, activation = config.precision.dtype.full_name, activation_bytes(config)
    if config.parallel.sequence_parallel:
        # A layer: forward gathers twice and scatters twice; backward gathers twice the gradients and twice the
        # inputs anew, and scatters twice. The embedding scatters and gathers; the output layer gathers twice
        # and scatters once.
        traffic["tp", "all_gather", dtype] += m * activation * (6 * layers + 2 * again + first + 2 * last)
        traffic["tp", "reduce_scatter", dtype] += m * activation * (4 * layers + 2 * again + first + last)
        norms = sum(holding.norms) * ITEM_BYTES[dtype]
        traffic["tp", "all_reduce", dtype] += m * norms
    else:
        traffic["tp", "all_reduce", dtype] += m * activation * (4 * layers + 2 * again + first + last)
    traffic["tp", "all_reduce", dtype] += m * sum(holding.head_norms) * ITEM_BYTES[dtype]
    model = config.model
    if model.kv_heads < grid.tp:
        # Ranks that share a key/value head gather the fused qkv output and pick their heads.
        tokens = config.train.seq_len // grid.cp * config.train.micro_batch_size
        fused = tokens * model.qkv_width * ITEM_BYTES[dtype]
        traffic["tp", "all_gather", dtype] += m * fused * (layers + again)
        traffic["tp", "reduce_scatter", dtype] += m * fused * layers
    if last:
        # Cross-entropy: the largest logit, the logit of the label, the sum of exponentials, of each token.
        tokens = config.train.seq_len // grid.cp * config.train.micro_batch_size
        traffic["tp", "all_reduce", _wide(config)] += 3 * m * tokens * ITEM_BYTES[_wide(config)]


def _add_context_parallel(
    traffic: Counter[tuple[str, str, str]], config: RunConfig, grid: Grid, holding: _Holding, m: int
) -> None:
    """What attention moves: kernels/attention/context_parallel.py."""
    if grid.cp == 1:
        return
    model, train = config.model, config.train
    kv_heads = max(1, model.kv_heads // grid.tp)
    tokens = train.seq_len // grid.cp * train.micro_batch_size
    queries, keys = (tokens * n * model.head_width for n in (model.num_heads // grid.tp, kv_heads))
    dtype, wide = config.precision.dtype.full_name, _wide(config)
    # Values are as large as keys. A forward pass that runs again moves all that it moved before.
    backwards = m * holding.layers
    is_selective = train.recompute == Recompute.selective
    forwards = m * (holding.layers + (holding.layers if is_selective else holding.layers_again))
    if config.parallel.cp_kind == ContextKind.all_gather:
        traffic["cp", "all_gather", dtype] += (forwards + backwards) * grid.cp * 2 * keys * ITEM_BYTES[dtype]
        traffic["cp", "reduce_scatter", wide] += backwards * grid.cp * 2 * keys * ITEM_BYTES[wide]
    elif config.parallel.cp_kind == ContextKind.ring:
        # The gradients go one step further than keys and values: home.
        away = (forwards + backwards) * (grid.cp - 1)
        traffic["cp", "send", dtype] += away * 2 * keys * ITEM_BYTES[dtype]
        traffic["cp", "send", wide] += backwards * grid.cp * 2 * keys * ITEM_BYTES[wide]
    else:
        repeats = grid.cp // math.gcd(grid.cp, kv_heads)
        exchanged = 2 * queries + 2 * keys * repeats
        traffic["cp", "all_to_all", dtype] += (forwards + backwards) * exchanged * ITEM_BYTES[dtype]


def _add_pipeline(
    traffic: Counter[tuple[str, str, str]], config: RunConfig, grid: Grid, place: Coordinates, m: int
) -> None:
    if grid.pp == 1:
        return
    part = activation_bytes(config) // (grid.tp if config.parallel.sequence_parallel else 1)
    # Every chunk but the last of all sends forward, every chunk but the first of all sends backward.
    forward = config.parallel.vp - int(place.pp == grid.pp - 1)
    backward = config.parallel.vp - int(place.pp == 0)
    traffic["pp", "send", config.precision.dtype.full_name] += m * part * (forward + backward)
    traffic["pp", "all_reduce", "float64"] += 2 * 8  # loss and tokens


def _add_zero(
    traffic: Counter[tuple[str, str, str]], config: RunConfig, grid: Grid, holding: _Holding, m: int
) -> None:
    stage, dtype, wide = config.zero.stage, config.precision.dtype.full_name, _wide(config)
    item, wide_item = ITEM_BYTES[dtype], ITEM_BYTES[wide]
    groups = [group for group in (holding.matrices, holding.vectors) if group]
    elements = sum(map(sum, groups))
    ranks = grid.dp * grid.cp
    is_bf16 = config.precision.dtype == Dtype.bf16
    is_bf16_optimizer = is_bf16 and stage < 2 and not config.zero.offload
    # For overflow.
    is_checked = config.precision.dtype == Dtype.fp16 or (is_bf16 and stage < 3 and not is_bf16_optimizer)
    if grid.tp * grid.pp > 1:
        scalar = "float64" if stage == 3 else wide
        # Gradient norm: once for each group with and without decay; DeepSpeed's BF16_Optimizer takes one for both.
        traffic["tp_pp", "all_reduce", scalar] += (1 if is_bf16_optimizer else 2) * ITEM_BYTES[scalar]
        if is_checked:
            traffic["tp_pp", "all_reduce", "uint8"] += 1
    if ranks == 1:
        return
    traffic["dp_cp", "all_reduce", "float64"] += 8  # loss
    traffic["dp_cp", "all_reduce", "int64"] += 8  # tokens
    if is_checked and stage > 0:
        traffic["dp_cp", "all_reduce", "uint8"] += 1
    if stage == 0:
        traffic["dp_cp", "all_reduce", wide] += elements * wide_item
    elif stage < 3:
        # ZeRO 2 keeps no gradient of another rank, so it reduces at every micro-batch, or as often as it is told.
        together = config.zero.accumulate_micro_batches
        times = -(-m // together) if stage == 2 else 1
        traffic["dp_cp", "all_reduce", wide] += elements * wide_item * times
        if stage == 2 and config.model.tie_embeddings and grid.pp > 1 and holding.is_first:
            # The last stage's gradient of the tied weight comes in as one more backward.
            more = -(-(m + 1) // together) - times
            traffic["dp_cp", "all_reduce", wide] += holding.matrices[-1] * wide_item * more
        if not is_bf16_optimizer:
            traffic["dp_cp", "all_reduce", wide] += 2 * wide_item  # gradient norm
        alignment = ALIGNMENT * ranks
        padded = sum(-(-sum(group) // alignment) * alignment for group in groups)
        traffic["dp_cp", "all_gather", dtype] += padded * item
    else:
        padded = sum(-(-size // ranks) * ranks for group in groups for size in group)
        traffic["dp_cp", "reduce_scatter", wide] += padded * wide_item * m
        # Vectors are below the size from which DeepSpeed shards. Matrices stay whole from forward to backward where
        # the model is smaller than stage3_max_live_parameters (1e9 elements); above it they are gathered twice.
        vectors = sum(-(-size // ranks) * ranks for size in holding.vectors)
        traffic["dp_cp", "all_gather", dtype] += ((padded - vectors) * m + vectors) * item
        traffic["dp_cp", "all_reduce", "float64"] += 2 * 8


def _add_ties(
    traffic: Counter[tuple[str, str, str]], config: RunConfig, grid: Grid, place: Coordinates
) -> None:
    if not config.model.tie_embeddings or grid.pp == 1 or 0 < place.pp < grid.pp - 1:
        return
    rows = padded_vocab_size(config.model.vocab_size, multiple=config.model.vocab_multiple)
    elements = rows * config.model.hidden_size // grid.tp
    for dtype in (_wide(config), config.precision.dtype.full_name):  # gradient, weight
        traffic["first_last", "broadcast", dtype] += elements * ITEM_BYTES[dtype]
