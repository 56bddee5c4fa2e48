"""Rules about how a model and its batch are split over ranks. Most of them divide by sizes, which must be positive."""

from __future__ import annotations

from collections.abc import Iterator

from megallama.config.schema import AdamKernel, AttentionKernel, ContextKind, Dtype, Recompute, RunConfig
from megallama.grid import (
    Grid,
    micro_batch_group_size,
    nearest_multiples,
    num_micro_batches,
    padded_vocab_size,
    split_layers,
)


def check_world_size(config: RunConfig, world_size: int | None) -> Iterator[str]:
    """The ranks form a whole grid."""
    try:
        _dp(config, world_size)
    except ValueError as error:
        yield str(error)


def check_batch(config: RunConfig, world_size: int | None) -> Iterator[str]:
    """A step's batch is a whole number of micro-batches on each rank; dp counts as 1 while it is unknown."""
    train = config.train
    try:
        dp = _dp(config, world_size)
    except ValueError:
        dp = 1
    try:
        micro_batches = num_micro_batches(
            train.global_batch_size, micro_batch_size=train.micro_batch_size, dp=dp
        )
        if config.parallel.vp > 1:
            micro_batch_group_size(micro_batches, pp=config.parallel.pp)
        together = config.zero.accumulate_micro_batches
        if together > micro_batches:
            yield (
                f"zero.accumulate_micro_batches ({together}) must be at most the micro-batches of a step"
                f" ({micro_batches}): use {micro_batches} or less"
            )
    except ValueError as error:
        yield str(error)


def _dp(config: RunConfig, world_size: int | None) -> int:
    parallel = config.parallel
    if world_size is None:
        return 1
    return Grid.from_world_size(world_size, tp=parallel.tp, cp=parallel.cp, pp=parallel.pp).dp


def check_heads_over_tp(config: RunConfig) -> Iterator[str]:
    """Tensor parallelism cuts attention by heads.

    Fewer key/value heads than ranks are fine when they share the ranks evenly: megatron-core then gathers the
    fused qkv output and lets each rank pick its heads (0.16.1, core/transformer/attention.py).
    """
    model, tp = config.model, config.parallel.tp
    kv_heads = model.kv_heads
    if model.num_heads % tp:
        yield (
            f"model.num_heads ({model.num_heads}) must be a multiple of parallel.tp ({tp}):"
            f" use parallel.tp={_divisors(model.num_heads, tp)}"
        )
    elif kv_heads % tp and tp % kv_heads:
        yield (
            f"model.num_kv_heads ({kv_heads}) must be a multiple or a divisor of parallel.tp ({tp}):"
            f" use parallel.tp={_divisors(kv_heads, tp)}"
        )
    elif model.hidden_size % model.num_heads == 0 or model.head_dim:
        width = model.qkv_width
        if width % tp:
            yield (
                f"the width of query, key and value ({model.num_heads} + 2 x {kv_heads} heads = {width})"
                f" must be a multiple of parallel.tp ({tp}): use parallel.tp={_divisors(width, tp)}"
            )


def check_widths_over_tp(config: RunConfig) -> Iterator[str]:
    """Tensor parallelism cuts the MLP by its hidden width and the embedding by rows."""
    model, tp = config.model, config.parallel.tp
    if model.ffn_hidden_size % tp:
        yield (
            f"model.ffn_hidden_size ({model.ffn_hidden_size}) must be a multiple of parallel.tp ({tp}):"
            f" use parallel.tp={_divisors(model.ffn_hidden_size, tp)},"
            f" or a width of {nearest_multiples(model.ffn_hidden_size, tp)}"
        )
    rows = padded_vocab_size(model.vocab_size, multiple=model.vocab_multiple)
    if rows % tp:
        yield (
            f"the padded vocabulary ({model.vocab_size} to a multiple of model.vocab_multiple"
            f" {model.vocab_multiple} = {rows}) must be a multiple of parallel.tp ({tp}):"
            " make model.vocab_multiple a multiple of parallel.tp"
        )


def check_layers_over_pp(config: RunConfig) -> Iterator[str]:
    """Every stage of the pipeline holds a layer, every layer lies on a stage, and only a pipeline has chunks."""
    parallel, layers = config.parallel, config.model.num_layers
    pp, vp, split = parallel.pp, parallel.vp, list(parallel.layers_per_stage)
    if vp > 1 and pp == 1:
        yield f"parallel.vp ({vp}) needs parallel.pp (1) above 1: a single stage has no bubble; use parallel.vp=1"
    elif pp * vp > layers:
        yield (
            f"model.num_layers ({layers}) must be at least parallel.pp x parallel.vp ({pp} x {vp} = {pp * vp}):"
            " use fewer stages or chunks"
        )
    elif split and (len(split) != pp * vp or min(split) < 1 or sum(split) != layers):
        even = ",".join(map(str, split_layers(layers, pp * vp)))
        yield (
            f"parallel.layers_per_stage ({split}) must be parallel.pp x parallel.vp ({pp} x {vp} = {pp * vp}) numbers"
            f" of at least 1 that add up to model.num_layers ({layers}): use [{even}]"
        )
    elif not split and layers % (pp * vp):
        stages = f"parallel.pp ({pp})" if vp == 1 else f"parallel.pp x parallel.vp ({pp} x {vp} = {pp * vp})"
        uneven = ",".join(map(str, split_layers(layers, pp * vp)))
        yield (
            f"model.num_layers ({layers}) must be a multiple of {stages}: use another number of stages,"
            f" or give the uneven split with parallel.layers_per_stage=[{uneven}]"
        )


def check_recompute(config: RunConfig) -> Iterator[str]:
    """A number of layers to recompute belongs to full recomputation."""
    train = config.train
    if train.recompute_layers is not None and train.recompute != Recompute.full:
        yield (
            f"train.recompute_layers ({train.recompute_layers}) needs train.recompute=full"
            f" (it is {train.recompute.value}): set that, or leave recompute_layers out"
        )


def check_offload(config: RunConfig) -> Iterator[str]:
    """Offload goes with stages 1 and 2."""
    zero = config.zero
    if zero.offload and zero.stage not in (1, 2):
        yield (
            f"zero.offload (true) needs zero.stage ({zero.stage}) 1 or 2: stage 0 shards nothing, so every rank of a"
            " host would hold all of the state; stage 3 with offload has not been verified"
        )


def check_apex(config: RunConfig) -> Iterator[str]:
    """NVIDIA apex's AdamW updates on the GPU, a whole parameter group at a time."""
    zero = config.zero
    if config.kernels.adam is not AdamKernel.apex:
        return
    if zero.stage == 3:
        yield (
            "kernels.adam (apex) counts steps by parameter group, and zero.stage (3) updates a group in several parts,"
            " each of which would count: use kernels.adam=auto"
        )
    if zero.offload:
        yield (
            "kernels.adam (apex) updates on the GPU, and zero.offload (true) keeps the optimizer state in host memory:"
            " use kernels.adam=auto"
        )


def check_transformer_engine(config: RunConfig) -> Iterator[str]:
    """Transformer Engine takes whole sequences in 16 bits."""
    if config.kernels.attention != AttentionKernel.te:
        return
    if config.parallel.cp > 1:
        yield (
            f"kernels.attention (te) cannot cut a sequence (parallel.cp={config.parallel.cp}): it cuts every document"
            " into chunks, this project the whole sequence; use kernels.attention=sdpa"
        )
    if config.precision.dtype not in (Dtype.bf16, Dtype.fp16):
        yield (
            f"kernels.attention (te) needs precision.dtype bf16 or fp16 (it is {config.precision.dtype.value}):"
            " use kernels.attention=sdpa"
        )


def check_accumulation(config: RunConfig) -> Iterator[str]:
    """Only stage 2 reduces at every micro-batch without need."""
    zero = config.zero
    if zero.accumulate_micro_batches < 1:
        yield (
            f"zero.accumulate_micro_batches ({zero.accumulate_micro_batches}) must be at least 1:"
            " 1 reduces at every micro-batch"
        )
    elif zero.accumulate_micro_batches > 1 and zero.stage != 2:
        reason = (
            "stage 3 holds no room for whole gradients"
            if zero.stage == 3
            else "stages 0 and 1 reduce once a step"
        )
        yield (
            f"zero.accumulate_micro_batches ({zero.accumulate_micro_batches}) needs zero.stage=2 (it is {zero.stage}):"
            f" {reason}, leave it out"
        )


def check_sequence_parallel(config: RunConfig) -> Iterator[str]:
    """Sequence parallelism cuts sequences over the tensor-parallel ranks."""
    tp, seq_len = config.parallel.tp, config.train.seq_len
    if not config.parallel.sequence_parallel:
        return
    if tp == 1:
        yield "parallel.sequence_parallel (true) needs parallel.tp (1) above 1: set it to false or raise tp"
    elif seq_len % tp:
        yield (
            f"train.seq_len ({seq_len}) must be a multiple of parallel.tp ({tp}) with"
            f" parallel.sequence_parallel=true: use {nearest_multiples(seq_len, tp)}"
        )


def check_context_parallel(config: RunConfig) -> Iterator[str]:
    """Context parallelism cuts sequences into two equal chunks a rank, ulysses also the heads."""
    parallel, seq_len = config.parallel, config.train.seq_len
    tp, cp = parallel.tp, parallel.cp
    if cp == 1:
        return
    chunks = 2 * cp * (tp if parallel.sequence_parallel else 1)
    if seq_len % chunks:
        sizes = f"2 x {cp} x {tp}" if parallel.sequence_parallel else f"2 x {cp}"
        shared = " x parallel.tp, with parallel.sequence_parallel=true" if parallel.sequence_parallel else ""
        yield (
            f"train.seq_len ({seq_len}) must be a multiple of 2 x parallel.cp{shared} ({sizes} = {chunks}):"
            f" use {nearest_multiples(seq_len, chunks)}"
        )
    heads = config.model.num_heads
    if parallel.cp_kind == ContextKind.ulysses and heads % tp == 0 and heads // tp % cp:
        yield (
            f"parallel.cp_kind (ulysses) needs the heads of a tensor rank (model.num_heads / parallel.tp ="
            f" {heads} / {tp} = {heads // tp}) to be a multiple of parallel.cp ({cp}):"
            " use parallel.cp_kind=all_gather or ring, or a smaller cp"
        )


def check_combinations(config: RunConfig) -> Iterator[str]:
    """What is not supported, or not yet, with the reason."""
    stage = config.zero.stage
    if not 0 <= stage <= 3:
        yield f"zero.stage ({stage}) must be 0, 1, 2 or 3: 1 shards the optimizer state and suits most runs"


def _divisors(value: int, near: int) -> str:
    """The divisors of `value` on both sides of `near`, as words: "2 or 4"."""
    divisors = [divisor for divisor in range(1, value + 1) if value % divisor == 0]
    below = [divisor for divisor in divisors if divisor < near]
    above = [divisor for divisor in divisors if divisor > near]
    return " or ".join(str(divisor) for divisor in below[-1:] + above[:1])
