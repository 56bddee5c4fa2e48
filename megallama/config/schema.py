"""The typed tree of all settings of a run, with the values that each choice allows.

A run is one frozen `RunConfig`. The string below each field states its meaning, unit and rule;
`docs/configuration.md` is generated from these strings, so they are the reference.
Fields hold plain values only. Rules that involve more than one field are in `check_*.py`.
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
    """Shape of the learning-rate curve after warm-up."""

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
    """What happens to a document that does not fit into the rest of a sequence."""

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
    """Shape of the model. `model=<name>` selects a file of `conf/model/`."""

    name: str = MISSING
    """Name of the shape, for logs and the run folder."""
    num_layers: int = MISSING
    """Number of transformer layers."""
    hidden_size: int = MISSING
    """Width of the residual stream."""
    ffn_hidden_size: int = MISSING
    """Width of the SwiGLU hidden layer (the gate and the up projection each have this width)."""
    num_heads: int = MISSING
    """Number of query heads."""
    num_kv_heads: int | None = None
    """Number of key/value heads (grouped-query attention). Null: as many as query heads."""
    head_dim: int | None = None
    """Width of one head. Null: hidden_size / num_heads."""
    vocab_size: int = MISSING
    """Number of token ids. When `data.tokenizer` is set, it must equal the tokenizer's vocabulary size or exceed it by
    at most 1% (as Qwen's models do)."""
    vocab_multiple: int = 128
    """The number of embedding rows is rounded up to a multiple of this. It is part of the model's shape and does not
    depend on tp."""
    max_seq_len: int = MISSING
    """Longest context that the model is meant for, in tokens. `train.seq_len` must not exceed it."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling = RopeScaling.none
    """How the rotary frequencies are scaled for long contexts. `dynamic` (NTK) raises the base according to how far
    `train.seq_len` exceeds `rope_original_max_seq_len`. The base stays the same for the whole run, and is unchanged if
    `train.seq_len` does not exceed that length."""
    rope_scaling_factor: float = 1.0
    """Scaling factor of `rope_scaling`: 8 for LLaMA 3.1, 32 for LLaMA 3.2."""
    rope_original_max_seq_len: int = 8192
    """Context length that the unscaled frequencies were trained for, in tokens (the original context). Used by
    `rope_scaling` llama3, yarn and dynamic."""
    rope_low_freq_factor: float = 1.0
    """For `rope_scaling=llama3`: frequencies that complete fewer than this many rotations within the original context
    are divided by the full factor."""
    rope_high_freq_factor: float = 4.0
    """For `rope_scaling=llama3`: frequencies that complete more than this many rotations within the original context
    are unchanged. Frequencies between the two limits are interpolated."""
    rope_beta_fast: float = 32.0
    """For `rope_scaling=yarn`: frequencies that complete more than this many rotations within the original context
    are unchanged. Frequencies between the two limits are interpolated."""
    rope_beta_slow: float = 1.0
    """For `rope_scaling=yarn`: frequencies that complete fewer than this many rotations within the original context
    are divided by the full factor."""
    rope_attention_factor: float | None = None
    """For `rope_scaling=yarn`: queries and keys are multiplied by this. Null: 0.1 x ln(rope_scaling_factor) + 1."""
    norm_eps: float = 1e-5
    """Epsilon of RMSNorm."""
    qkv_bias: bool = False
    """Add a bias to queries, keys and values (Qwen2, Qwen2.5)."""
    qk_norm: bool = False
    """Apply RMSNorm to each query and key head before the rotary embedding (Qwen3)."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the weight of the output layer too."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; output projections use init_std / sqrt(2 x num_layers)."""
    hidden_dropout: float = 0.0
    """Dropout probability after attention and after the MLP. LLaMA uses none."""

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
    """Sizes of the parallel axes. The data-parallel size dp is not a setting: it is world_size / (tp x pp x cp)."""

    tp: int = 1
    """Tensor-parallel size: each layer is split across this many ranks. Keep it within a node."""
    pp: int = 1
    """Pipeline-parallel size: number of pipeline stages."""
    cp: int = 1
    """Context-parallel size: each sequence is split across this many ranks. Each rank holds two chunks of it."""
    cp_kind: ContextKind = ContextKind.all_gather
    """How context-parallel ranks exchange keys and values. all_gather: each rank gathers all of them. ring: they are
    passed from rank to rank during the computation. ulysses: ranks exchange positions for heads, so that each rank
    has whole sequences of a part of the heads (num_heads / tp must be a multiple of cp)."""
    vp: int = 1
    """Virtual pipeline size: chunks of layers per rank (interleaved pipeline). It divides the pipeline bubble and
    multiplies the traffic between stages. Needs pp > 1."""
    layers_per_stage: list[int] = field(default_factory=list)
    """Number of layers of each stage in model order, for an uneven split: a list of pp x vp numbers. Empty: every
    stage has the same number."""
    sequence_parallel: bool = False
    """Split the activations between tensor-parallel regions along the sequence. Needs tp > 1."""


@dataclass(frozen=True)
class ZeroConfig:
    """Sharding of optimizer state, gradients and parameters across the data-parallel ranks (DeepSpeed ZeRO)."""

    stage: int = 1
    """ZeRO stage. 0: nothing is sharded. 1: optimizer state is sharded. 2: gradients too. 3: parameters too."""
    accumulate_micro_batches: int = 1
    """Number of micro-batches whose gradients a rank sums locally (in fp32) before stage 2 reduces them. Values above
    1 divide the gradient traffic by this number and take 4 bytes per parameter of the rank, whatever the number."""
    offload: bool = False
    """Keep the optimizer state in CPU memory and run the update there, which frees device memory. Stages 1 and 2
    only."""


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats. Master weights, gradient accumulation and gradient reduction are always fp32."""

    dtype: Dtype = Dtype.bf16
    """Format of parameters and activations. fp64 is for `megallama verify`: accumulation and reduction are then fp64
    too."""
    initial_loss_scale: float = 65536.0
    """Initial dynamic loss scale for fp16; a power of two."""
    loss_scale_window: int = 1000
    """Number of steps without overflow after which the fp16 loss scale is doubled."""


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch sizes and folder of the run."""

    steps: int = MISSING
    """Total number of optimizer steps."""
    seed: int = 1234
    """Random seed of the initial weights, the data order and dropout."""
    run_dir: str = MISSING
    """Folder of this run: configuration, metrics, logs and checkpoints. If it exists, the run in it is continued."""
    init_from: str | None = None
    """Where a new run takes its initial weights from: a checkpoint, a run folder (its newest intact checkpoint), or a
    Hugging Face model folder. Any layout may have written it. The run starts at step 0 with a fresh optimizer.
    `model.rope_*` and `model.norm_eps` may differ from the source. Ignored once the run has a checkpoint of its own.
    Null: random weights."""
    seq_len: int = MISSING
    """Length of a training sequence in tokens."""
    micro_batch_size: int = 1
    """Sequences per forward pass on one data-parallel rank."""
    global_batch_size: int = MISSING
    """Sequences per optimizer step, over the whole job."""
    recompute: Recompute = Recompute.none
    """Activation recomputation: none, selective (core attention only), or full (every layer, or the first
    `recompute_layers`)."""
    recompute_layers: int | None = None
    """How many layers of each stage (of each chunk if vp > 1) `recompute=full` recomputes, counted from the first.
    Null: all."""
    check_invariants: bool = False
    """Before each step, check that replicated parameters are bit-equal across dp, cp, tp and pipeline stages, and that
    gradients start from zero."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate. Weight decay is decoupled and does not apply to norms and biases."""

    lr: float = MISSING
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end of the schedule, as a fraction of `lr`."""
    schedule: Schedule = Schedule.cosine
    """Learning-rate curve after warm-up: cosine, linear, wsd (constant, then linear decay during the last
    `decay_steps`), or constant."""
    warmup_steps: int = 0
    """Number of steps of linear warm-up from 0 to `lr`."""
    decay_steps: int = 0
    """Number of steps of the final decay with `schedule=wsd`."""
    beta1: float = 0.9
    """Decay rate of Adam's first moment."""
    beta2: float = 0.95
    """Decay rate of Adam's second moment."""
    eps: float = 1e-8
    """Adam's epsilon: added to the square root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, applied to matrices and embeddings."""
    clip: float = 1.0
    """Gradients are clipped to this global norm; 0 switches clipping off."""
    partial_steps: int = 0
    """Number of steps at the beginning of the run that train only `partial_parameters` and the rows from
    `partial_rows_from` on. All other weights stay bit-identical, and no weight decay is applied. After these steps
    everything is trained."""
    partial_parameters: list[str] = field(default_factory=list)
    """Canonical names of the parameters to train (docs/checkpoint-format.md); `*` matches any part of a name. Example:
    [embedding.*, output_layer.*]."""
    partial_rows_from: int | None = None
    """First token id whose rows of the embedding and the output layer are trained. After `megallama expand-vocab` this
    is the size of the old vocabulary."""


@dataclass(frozen=True)
class SourceConfig:
    """One data source: a prepared dataset and its share of the mix."""

    path: str = MISSING
    """Path prefix of a `.bin`/`.idx` pair as `megallama prepare` (or Megatron) writes it."""
    weight: float = 1.0
    """Share of the samples, relative to the weights of the other sources. 0: the source is not used."""
    max_epochs: float | None = None
    """Number of epochs after which the source leaves the mix. The remaining sources keep their relative proportions.
    Null: it never leaves."""
    validation_fraction: float = 0.0
    """Fraction of the source's tokens that is held out of training and used for validation. Whole documents are taken
    from the end of the source."""


@dataclass(frozen=True)
class MixConfig:
    """A mix that takes effect at a given step."""

    from_step: int = MISSING
    """First step (counted from 0) that uses this mix."""
    sources: list[SourceConfig] = field(default_factory=list)
    """All sources from that step on, written as in `data.sources`. A source that was used before continues where it
    stopped."""


@dataclass(frozen=True)
class DataConfig:
    """Training and validation data."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Training data: a list of `{path, weight}`. A plain string means that path with weight 1. The list may be changed
    when a run is resumed: each source continues where it stopped."""
    schedule: list[MixConfig] = field(default_factory=list)
    """Mixes that take effect at later steps, in order: a list of `{from_step, sources}`."""
    validation: list[SourceConfig] = field(default_factory=list)
    """Validation data, written like `sources`. Empty: no evaluation."""
    tokenizer: str | None = None
    """Tokenizer file. Its vocabulary is checked against the model and the data. A copy is kept in the run folder."""
    reset_positions: bool = False
    """Restart positions at 0 in every document instead of only at the start of a sequence. Attention never crosses a
    document boundary in either case."""
    packing: Packing = Packing.continued
    """What happens to a document that does not fit into the rest of a sequence. continued: it goes on in another
    sequence. cut: it ends with the sequence and the rest of it is not used, so that every sequence begins with a
    document."""
    loss_on_eod: bool = True
    """Include the prediction of the end-of-document token in the loss."""
    loss_after_eod: bool = True
    """Include the prediction of the first token of the next document in the loss. Nothing that the model sees lets it
    predict this token."""
    verify_checksums: bool = False
    """At each start, before the first step, read all data and compare it with the checksums of its manifests. One rank
    reads with one core while the others wait; SHA-256 takes 2.5 s per GB on a CPU without instructions for it.
    `megallama data verify` does the same without starting a run."""

    def all_sources(self) -> Iterator[SourceConfig]:
        """Every source that is named, scheduled ones and validation too."""
        yield from self.sources
        for entry in self.schedule:
            yield from entry.sources
        yield from self.validation


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving of checkpoints."""

    interval: int = 1000
    """Steps between checkpoints. 0: only the final one."""
    keep: int = 2
    """Number of newest checkpoints that are kept. 0: all."""
    keep_every: int = 0
    """Steps between checkpoints that are kept permanently; a multiple of `checkpoint.interval`. 0: none."""
    async_save: bool = True
    """Write checkpoints in the background, from a copy in host memory. false: training waits until the checkpoint is
    written."""


@dataclass(frozen=True)
class EvalConfig:
    """Validation during the run."""

    interval: int = 0
    """Steps between evaluations. 0: only at the end, if there is validation data."""
    batches: int = 8
    """Number of global batches per evaluation. Every evaluation uses the same ones."""


@dataclass(frozen=True)
class KernelConfig:
    """Which implementation (backend) is used for an operation.

    `auto` selects the best one that runs on this machine and logs its choice. An explicit name that cannot run is an
    error.
    """

    attention: AttentionKernel = AttentionKernel.auto
    """Core attention. sdpa: torch's fused kernels (the choice of auto). te: NVIDIA Transformer Engine, if it is
    installed (bf16 or fp16, with parallel.cp=1). reference: plain formulas."""
    norm: NormKernel = NormKernel.auto
    """RMSNorm."""
    adam: AdamKernel = AdamKernel.auto
    """AdamW."""


@dataclass(frozen=True)
class LogConfig:
    """Where metrics are written. `metrics.jsonl` is always written."""

    interval: int = 1
    """Steps between console lines when the output is not a terminal."""
    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    wandb: WandbMode = WandbMode.auto
    """Weights & Biases mode. auto: as WANDB_MODE and W&B's settings file say; where they say nothing, online if there
    is a key (`wandb login`, WANDB_API_KEY), else offline in the run folder. It never prompts."""
    wandb_project: str | None = None
    """Name of the Weights & Biases project. Null: WANDB_PROJECT, else megallama."""
    traffic: bool = False
    """Record the bytes of every collective and send of rank 0 as metrics `traffic/...`, by group, operation and
    format."""
    samples: bool = False
    """Write the source, epoch and position in the epoch of every sample of each step to `samples.jsonl` in the run
    folder."""
    peak_tflops: float | None = None
    """Peak matrix throughput of one device in TFLOP/s, the denominator of MFU. null: that of the data sheet of a known
    GPU, else measured at the start of the run."""


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run."""

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
