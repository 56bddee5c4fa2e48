"""Builds this rank's pipeline stage: megatron-core's GPTModel with our modules and initial weights."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megallama.config.schema import (
    Dtype,
    KernelConfig,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    Recompute,
    TrainConfig,
)
from megallama.grid import padded_vocab_size, split_layers
from megallama.host.dtypes import FLOATS
from megallama.kernels.attention.core import choose_attention
from megallama.kernels.norm import choose_norm
from megallama.model.chunks import Chunks, take_output_weight
from megallama.model.initialize import initialize_parameter
from megallama.model.layout import Piece, canonical_layout
from megallama.model.modules import CoreAttention, HeadNorm, RmsNorm, SwigluMlp, with_kernel
from megallama.model.rope import RotaryAngles, attention_factor, inverse_frequencies
from megallama.topology.groups import Topology

log = logging.getLogger(__name__)

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class Stage:
    """What this rank holds of the model."""

    model: ModelConfig
    """The shape of the whole model."""
    module: Chunks
    """The chunks of this rank in one module: one engine shards the parameters of all."""
    transformer: TransformerConfig
    """megatron-core's view of the shape; the schedule reads it."""
    layout: dict[str, tuple[Piece, ...]]
    """Canonical place of every parameter, by local name."""
    tied_copy: torch.Tensor | None = None
    """The last stage's copy of the embedding, where another stage owns it; no parameter of `module`."""

    @property
    def chunks(self) -> list[Any]:
        """megatron-core's models, in the order in which a micro-batch passes them."""
        return list(self.module.chunks)


def build_model(
    model: ModelConfig,
    *,
    topology: Topology,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    train: TrainConfig,
    kernels: KernelConfig,
    is_initialized: bool = True,
) -> Stage:
    """This rank's stage with canonical initial weights, on the host; the engine moves it to the device.

    Args:
        model: Shape of the whole model.
        topology: Place of this rank.
        parallel: How the model is cut; what `topology` was connected with.
        precision: Format of parameters and activations.
        train: Sequence length, seed of the initial weights, recomputation.
        kernels: Which attention and norm.
        is_initialized: False leaves the weights undefined, for a caller that fills all of them.
    """
    transformer = transformer_config(model, parallel=parallel, precision=precision, train=train)
    attention = choose_attention(kernels.attention.value, cp_kind=parallel.cp_kind.value)
    norm_name, norm = choose_norm(kernels.norm.value)
    log.info("kernels: attention=%s norm=%s", attention.backend, norm_name)
    vp = parallel.vp
    # megatron-core's own way needs its gradient buffers, which ZeRO has not: model/chunks.py ties them.
    is_tied_over_stages = model.tie_embeddings and parallel.pp > 1
    spec = (
        with_kernel(CoreAttention, attention),
        with_kernel(RmsNorm, norm),
        with_kernel(HeadNorm, norm) if model.qk_norm else None,
    )
    chunks = [
        GPTModel(
            transformer,
            _layer_spec(transformer, *spec, vp_stage=index if vp > 1 else None),
            vocab_size=padded_vocab_size(model.vocab_size, multiple=model.vocab_multiple),
            max_sequence_length=train.seq_len,
            pre_process=topology.is_first_stage and index == 0,
            post_process=topology.is_last_stage and index == vp - 1,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=model.tie_embeddings and not is_tied_over_stages,
            parallel_output=True,
            vp_stage=index if vp > 1 else None,
        )
        for index in range(vp)
    ]
    frequencies = inverse_frequencies(model, seq_len=train.seq_len)
    for chunk in chunks:
        chunk.rotary_pos_emb = RotaryAngles(frequencies)
    tied_weight, tied_copy = None, None
    layout: dict[str, tuple[Piece, ...]] = {}
    for index, chunk in enumerate(chunks):
        pieces = canonical_layout(chunk)
        if is_tied_over_stages and chunk.post_process:
            pieces[OUTPUT] = tuple(replace(piece, key=EMBEDDING, is_owner=False) for piece in pieces[OUTPUT])
        for name, parameter in chunk.named_parameters():
            if is_initialized:
                initialize_parameter(parameter, pieces[name], model=model, seed=train.seed)
            # By this mark DeepSpeed and megatron-core tell a tensor-parallel part from a copy when they sum norms.
            parameter.tensor_model_parallel = any(p.shape != p.global_shape for p in pieces[name])
        if is_tied_over_stages and chunk.pre_process:
            tied_weight = chunk.embedding.word_embeddings.weight
        if is_tied_over_stages and chunk.post_process:
            tied_copy = take_output_weight(chunk)
            del pieces[OUTPUT]
        layout |= {f"chunks.{index}.{name}": place for name, place in pieces.items()}
    module = Chunks(chunks, tied_weight=tied_weight)
    return Stage(model=model, module=module, transformer=transformer, layout=layout, tied_copy=tied_copy)


def transformer_config(
    model: ModelConfig, *, parallel: ParallelConfig, precision: PrecisionConfig, train: TrainConfig
) -> TransformerConfig:
    """megatron-core's configuration of this run; the one place where names are translated to its own."""
    dtype = FLOATS[precision.dtype.full_name]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_width,
        # YaRN scales queries and keys; their product takes the square.
        softmax_scale=attention_factor(model) ** 2 / math.sqrt(model.head_width),
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision.dtype == Dtype.bf16,
        fp16=precision.dtype == Dtype.fp16,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        **_pipeline(parallel, num_layers=model.num_layers),
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        **_recompute(train),
        # The loss function scales by the token count of the whole step itself.
        calculate_per_token_loss=True,
        # Parameters are allocated on the host and filled by initialize.py.
        use_cpu_initialization=True,
        perform_initialization=False,
        # Fusions that need apex or Transformer Engine, or main_grad, which DeepSpeed does not keep.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        cuda_graph_scope=[],
    )


def _pipeline(parallel: ParallelConfig, *, num_layers: int) -> dict[str, object]:
    if parallel.pp == 1:
        return {}
    stages = parallel.layers_per_stage or split_layers(num_layers, parallel.pp * parallel.vp)
    names = [["decoder"] * layers for layers in stages]
    names[0].insert(0, "embedding")
    names[-1].append("loss")
    is_interleaved = parallel.vp > 1
    return dict(
        virtual_pipeline_model_parallel_size=parallel.vp if is_interleaved else None,
        pipeline_model_parallel_layout=names,
        # Batched sends and receives of both neighbours pair up wrongly where these are one rank, as with pp = 2:
        # garbage activations and no error (megatron-core 0.16.1).
        overlap_p2p_comm=is_interleaved,
        batch_p2p_comm=not is_interleaved,
        # megatron-core frees an output while an overlapped send is under way, by exchanging the memory of the tensor:
        # gloo then sends what came to lie there, and so may NCCL, which reads on a stream of its own and keeps the
        # tensor from being freed, not its memory. The other schedule waits for its sends first.
        deallocate_pipeline_outputs=not is_interleaved,
    )


def _recompute(train: TrainConfig) -> dict[str, object]:
    kind, layers = train.recompute, train.recompute_layers
    if kind == Recompute.full and layers is not None:
        return dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=layers)
    if kind == Recompute.full:
        return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    if kind == Recompute.selective:
        return dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    return {}


def _layer_spec(
    transformer: TransformerConfig,
    attention: type[torch.nn.Module],
    norm: type[torch.nn.Module],
    head_norm: type[torch.nn.Module] | None,
    *,
    vp_stage: int | None,
) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    parts.self_attention.submodules.core_attention = attention
    if head_norm is not None:
        parts.self_attention.submodules.q_layernorm = head_norm
        parts.self_attention.submodules.k_layernorm = head_norm
    parts.mlp = SwigluMlp  # a class, not a spec: megatron-core's handling of specs knows its own MLPs only
    num_layers = get_num_layers_to_build(transformer, vp_stage=vp_stage)
    return TransformerBlockSubmodules([layer] * num_layers, layer_norm=norm)
