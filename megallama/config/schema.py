"""The typed tree of every setting of a run.

A run is one frozen `RunConfig`. Each field carries its unit, default and rule in the string
below it; `docs/configuration.md` is generated from these strings, so they are the reference.
Plain values only. Rules that need more than one field stand in `check.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


class Dtype(str, Enum):
    """Precision of parameters and activations."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    fp64 = "fp64"

    @property
    def full_name(self) -> str:
        """What torch, NumPy and checkpoints call it, such as float32."""
        return "bfloat16" if self is Dtype.bf16 else self.value.replace("fp", "float")

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return int(self.value[2:]) // 8


class Schedule(str, Enum):
    """Shape of the learning rate after warm-up."""

    cosine = "cosine"
    linear = "linear"
    wsd = "wsd"
    constant = "constant"


class Recompute(str, Enum):
    """Which activations are recomputed in the backward pass instead of being kept."""

    none = "none"
    selective = "selective"
    full = "full"


class RopeScaling(str, Enum):
    """How rotary frequencies are changed for a longer context."""

    none = "none"
    linear = "linear"
    llama3 = "llama3"
    yarn = "yarn"
    dynamic = "dynamic"


class ContextKind(str, Enum):
    """How context-parallel ranks share the keys and values of a sequence."""

    all_gather = "all_gather"
    ring = "ring"
    ulysses = "ulysses"


class Packing(str, Enum):
    """What becomes of a document that a sequence has no room for."""

    continued = "continued"
    cut = "cut"


class AttentionKernel(str, Enum):
    """Implementation of core attention."""

    auto = "auto"
    sdpa = "sdpa"
    te = "te"
    reference = "reference"


class NormKernel(str, Enum):
    """Implementation of RMSNorm."""

    auto = "auto"
    torch = "torch"
    apex = "apex"
    reference = "reference"


class AdamKernel(str, Enum):
    """Implementation of AdamW."""

    auto = "auto"
    fused = "fused"
    apex = "apex"
    reference = "reference"


class WandbMode(str, Enum):
    """How Weights & Biases is used."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model. `model=<name>` picks one of `conf/model/`."""

    name: str = MISSING
    """Name of the shape, for logs and the run folder."""
    num_layers: int = MISSING
    """Number of transformer layers."""
    hidden_size: int = MISSING
    """Width of the residual stream."""
    ffn_hidden_size: int = MISSING
    """Width of the SwiGLU hidden layer (of gate and up each)."""
    num_heads: int = MISSING
    """Number of query heads."""
    num_kv_heads: int | None = None
    """Number of key/value heads (grouped-query attention). Null: as many as query heads."""
    head_dim: int | None = None
    """Width of one head. Null: hidden_size / num_heads."""
    vocab_size: int = MISSING
    """Number of token ids. Must be what the tokenizer says when `data.tokenizer` is set, or up to 1% more (Qwen)."""
    vocab_multiple: int = 128
    """The embedding is padded to a multiple of this; it is part of the shape, so it never depends on tp."""
    max_seq_len: int = MISSING
    """Longest context the shape is meant for, in tokens; `train.seq_len` may not exceed it."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling = RopeScaling.none
    """Change of the rotary frequencies for long contexts. `dynamic` (NTK) raises the base by what `train.seq_len`
    exceeds `rope_original_max_seq_len`, once for the whole run, and changes nothing below it."""
    rope_scaling_factor: float = 1.0
    """Factor of `rope_scaling`: 8 for LLaMA 3.1, 32 for LLaMA 3.2."""
    rope_original_max_seq_len: int = 8192
    """Context the frequencies were made for, in tokens; used by `rope_scaling` llama3, yarn and dynamic."""
    rope_low_freq_factor: float = 1.0
    """Of `rope_scaling=llama3`: fewer turns than this in the original context: the whole factor."""
    rope_high_freq_factor: float = 4.0
    """Of `rope_scaling=llama3`: more turns than this in the original context: no change."""
    rope_beta_fast: float = 32.0
    """Of `rope_scaling=yarn`: more turns than this in the original context: no change."""
    rope_beta_slow: float = 1.0
    """Of `rope_scaling=yarn`: fewer turns than this in the original context: the whole factor."""
    rope_attention_factor: float | None = None
    """Of `rope_scaling=yarn`: queries and keys are scaled by this. Null: 0.1 x ln(rope_scaling_factor) + 1."""
    norm_eps: float = 1e-5
    """Epsilon of RMSNorm."""
    qkv_bias: bool = False
    """Add a bias to queries, keys and values (Qwen2, Qwen2.5)."""
    qk_norm: bool = False
    """Normalise each head of queries and keys by RMSNorm before the rotation (Qwen3)."""
    tie_embeddings: bool = False
    """Share the embedding with the output layer."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; output projections use init_std / sqrt(2 x num_layers)."""
    hidden_dropout: float = 0.0
    """Dropout probability after attention and MLP. LLaMA uses none."""

    @property
    def head_width(self) -> int:
        """Width of one head, also where `head_dim` is null."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads, also where `num_kv_heads` is null."""
        return self.num_kv_heads or self.num_heads

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_width

    @property
    def qkv_width(self) -> int:
        """Width of all query, key and value heads together."""
        return (self.num_heads + 2 * self.kv_heads) * self.head_width


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the parallel axes. dp is never set: it is world_size / (tp x pp x cp)."""

    tp: int = 1
    """Tensor-parallel size: each layer is cut over this many ranks. Keep it inside a node."""
    pp: int = 1
    """Pipeline-parallel size: number of stages."""
    cp: int = 1
    """Context-parallel size: each sequence is cut over this many ranks, two chunks each."""
    cp_kind: ContextKind = ContextKind.all_gather
    """How these ranks share keys and values: all_gather collects them, ring passes them round while it computes,
    ulysses exchanges heads for positions (needs num_heads / tp a multiple of cp)."""
    vp: int = 1
    """Chunks of layers a rank (interleaved pipeline): the bubble shrinks by this, the traffic grows. Needs pp > 1."""
    layers_per_stage: list[int] = field(default_factory=list)
    """Layers of each stage in model order, pp x vp numbers, where they are not to be equal. Empty: equally many."""
    sequence_parallel: bool = False
    """Cut the activations between tensor-parallel regions along the sequence. Needs tp > 1."""


@dataclass(frozen=True)
class ZeroConfig:
    """Sharding of optimizer state, gradients and parameters over the data-parallel ranks (DeepSpeed ZeRO)."""

    stage: int = 1
    """0: nothing is sharded. 1: optimizer state. 2: and gradients. 3: and parameters."""
    accumulate_micro_batches: int = 1
    """Micro-batches whose gradients a rank sums itself (in fp32) before stage 2 reduces them. Above 1 it divides the
    traffic of gradients by this, and takes 4 bytes a parameter of the rank, whatever the number."""
    offload: bool = False
    """Keep optimizer state in CPU memory and update there, which frees device memory. Stages 1 and 2."""


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats. Master weights, gradient accumulation and reduction are fp32 in every case."""

    dtype: Dtype = Dtype.bf16
    """Format of parameters and activations. fp64 is for `megallama verify`: every sum is then fp64 too."""
    initial_loss_scale: float = 65536.0
    """First dynamic loss scale under fp16; a power of two."""
    loss_scale_window: int = 1000
    """Steps without overflow after which the fp16 loss scale doubles."""


@dataclass(frozen=True)
class TrainConfig:
    """Length, sizes and place of the run."""

    steps: int = MISSING
    """Number of optimizer steps of the whole run."""
    seed: int = 1234
    """Seed of initial weights, data order and dropout."""
    run_dir: str = MISSING
    """Folder of this run: config, metrics, logs, checkpoints. An existing one is continued."""
    init_from: str | None = None
    """Checkpoint, run folder (its newest intact checkpoint), or folder of a Hugging Face model, whose weights a new run
    starts from, in any layout, at step 0 and with a fresh optimizer; `model.rope_*` and `model.norm_eps` may be others
    than there. Not used once the run has a checkpoint of its own. Null: random weights."""
    seq_len: int = MISSING
    """Tokens of one training sequence."""
    micro_batch_size: int = 1
    """Sequences of one forward pass on a data-parallel rank."""
    global_batch_size: int = MISSING
    """Sequences of one optimizer step over the whole job."""
    recompute: Recompute = Recompute.none
    """Activation recomputation: none, selective (core attention), full (every layer, or `recompute_layers`)."""
    recompute_layers: int | None = None
    """Layers of each stage (of each chunk with vp > 1) that `recompute=full` recomputes, the first ones. Null: all."""
    check_invariants: bool = False
    """Before each step, prove that copies agree over dp, cp, tp and stages, and that gradients start from zero."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate. Weight decay is decoupled and spares norms and biases."""

    lr: float = MISSING
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end of the schedule as a share of `lr`."""
    schedule: Schedule = Schedule.cosine
    """Shape after warm-up: cosine, linear, wsd (constant, then `decay_steps` of linear decay), constant."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0 to `lr`."""
    decay_steps: int = 0
    """Steps of the final decay of `schedule=wsd`."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings."""
    clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    partial_steps: int = 0
    """Steps at the beginning of the run that train `partial_parameters` and the rows from `partial_rows_from` on, and
    nothing else: all other weights stay as they are, to the bit, and weight decay rests. Then everything is trained."""
    partial_parameters: list[str] = field(default_factory=list)
    """Canonical names of parameters (docs/checkpoint-format.md), `*` for any part: [embedding.*, output_layer.*]."""
    partial_rows_from: int | None = None
    """First token id whose rows of embedding and output layer are trained: the old vocabulary's size after
    `megallama expand-vocab`."""


@dataclass(frozen=True)
class SourceConfig:
    """One prepared dataset."""

    path: str = MISSING
    """Prefix of a `.bin`/`.idx` pair as `megallama prepare` (or Megatron) writes it."""
    weight: float = 1.0
    """Share of the samples, relative to the other sources. 0: none, as if it were not named."""
    max_epochs: float | None = None
    """Epochs after which the source leaves the mix, to which the others then keep their proportions. Null: never."""
    validation_fraction: float = 0.0
    """Share of the tokens, whole documents at its end, that is kept out of training and evaluated on."""


@dataclass(frozen=True)
class MixConfig:
    """Another mix from some step on."""

    from_step: int = MISSING
    """The first step (from 0) that takes it."""
    sources: list[SourceConfig] = field(default_factory=list)
    """All sources from there on, written as in `data.sources`; a source that was there before goes on where it was."""


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Training data: a list of `{path, weight}`; plain text stands for a path of weight 1. It may change between
    the runs of one run folder: each source goes on where it stopped."""
    schedule: list[MixConfig] = field(default_factory=list)
    """Mixes that take over at later steps, in order: a list of `{from_step, sources}`."""
    validation: list[SourceConfig] = field(default_factory=list)
    """Validation data, written likewise; empty: no evaluation."""
    tokenizer: str | None = None
    """Tokenizer file; its vocabulary is checked against model and data. The run folder gets a copy."""
    reset_positions: bool = False
    """Count positions from 0 in every document instead of in every sequence. Attention never crosses a document."""
    packing: Packing = Packing.continued
    """What becomes of a document that a sequence has no room for: continued in another sequence, or cut there, so that
    every sequence begins with a document (the rest is not used)."""
    loss_on_eod: bool = True
    """Count the loss of predicting the end-of-document token."""
    loss_after_eod: bool = True
    """Count the loss of predicting the first token of the next document, about which the model cannot know anything."""
    verify_checksums: bool = False
    """Before the first step of each start, read all data and compare it with its manifests' checksums. One rank reads
    while the others wait: one core's SHA-256, 2.5 s a GB where it has no instructions for it. `megallama
    data verify` does the same beforehand."""

    def all_sources(self) -> Iterator[SourceConfig]:
        """Every source that is named, scheduled ones and validation too."""
        yield from self.sources
        for entry in self.schedule:
            yield from entry.sources
        yield from self.validation


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving."""

    interval: int = 1000
    """Steps between checkpoints; 0: only the final one."""
    keep: int = 2
    """Newest checkpoints that are kept; 0 keeps all."""
    keep_every: int = 0
    """Steps between checkpoints that are kept for good, whatever their age; a multiple of the interval. 0: none."""
    async_save: bool = True
    """Write while training goes on, from a copy in host memory; false: training stands still until all is written."""


@dataclass(frozen=True)
class EvalConfig:
    """Validation during the run."""

    interval: int = 0
    """Steps between evaluations; 0: only at the end, if there is validation data."""
    batches: int = 8
    """Global batches of one evaluation, always the same ones."""


@dataclass(frozen=True)
class KernelConfig:
    """Which implementation computes what.

    `auto` takes the best that runs here and logs its choice; an explicit name that cannot run is an error.
    """

    attention: AttentionKernel = AttentionKernel.auto
    """Core attention: sdpa (torch's fused kernels, what auto takes), te (NVIDIA Transformer Engine, where it is
    installed; bf16 or fp16 with parallel.cp=1), reference (the formulas)."""
    norm: NormKernel = NormKernel.auto
    """RMSNorm."""
    adam: AdamKernel = AdamKernel.auto
    """AdamW."""


@dataclass(frozen=True)
class LogConfig:
    """Where numbers go. `metrics.jsonl` is always written."""

    interval: int = 1
    """Steps between console lines when the output is not a terminal."""
    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    wandb: WandbMode = WandbMode.auto
    """auto: online when WANDB_API_KEY is set, else offline in the run folder. Never asks."""
    wandb_project: str = "megallama"
    """Weights & Biases project."""
    traffic: bool = False
    """Count the bytes of every collective and send of rank 0, by group, operation and format, as `traffic/...`."""
    samples: bool = False
    """Write source, epoch and place of every sample of each step to `samples.jsonl` in the run folder."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    log: LogConfig = field(default_factory=LogConfig)
