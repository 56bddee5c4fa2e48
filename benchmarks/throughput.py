"""Tokens per second of training on this machine against `transformers` with a plain AdamW loop.

    python benchmarks/throughput.py [--dtype fp32 bf16] [--rounds 5] [--profile]

Both train the same LLaMA (about 15M parameters, sequence length 512) on the same tokens in one process,
alternating step blocks, so that whatever else the machine does hits both. Reported: the median of the
per-round ratios, tokens/s of each, and the share of a training run outside forward, backward and optimizer:
the trainer with its loader, metrics and TensorBoard.
`--profile` adds the operators that take the most time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from random_tokens import write_tokens

from megallama.config.schema import (
    CheckpointConfig,
    DataConfig,
    Dtype,
    LogConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    WandbMode,
    ZeroConfig,
)
from megallama.engine.build import Engine, build_run_engine
from megallama.host.launch import read_launch_environment
from megallama.model.counts import count_parameters
from megallama.topology.connect import connect
from megallama.trainer.loop import Loop

MICRO_BATCH, MICRO_BATCHES, SEQ_LEN = 4, 2, 512
MODEL = ModelConfig(
    name="llama_15m",
    num_layers=6,
    hidden_size=288,
    ffn_hidden_size=768,
    num_heads=6,
    vocab_size=16000,
    max_seq_len=1024,
)


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    loss_mask_BS: torch.Tensor
    positions_BS: torch.Tensor
    document_starts: tuple[tuple[int, ...], ...]


def batches() -> list[Batch]:
    """The same tokens for both."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(
        0, MODEL.vocab_size, (MICRO_BATCHES, MICRO_BATCH, SEQ_LEN + 1), generator=generator
    )
    mask, positions = torch.ones(MICRO_BATCH, SEQ_LEN), torch.arange(SEQ_LEN)[None]
    starts = ((0,),) * MICRO_BATCH
    return [Batch(t[:, :-1], t[:, 1:].contiguous(), mask, positions, starts) for t in tokens]


def run_config(dtype: str) -> RunConfig:
    """Ours: one rank, no sharding, no recomputation."""
    return RunConfig(
        model=MODEL,
        zero=ZeroConfig(stage=1),
        precision=PrecisionConfig(dtype=Dtype(dtype)),
        train=TrainConfig(
            steps=10_000,
            run_dir="unused",
            seq_len=SEQ_LEN,
            micro_batch_size=MICRO_BATCH,
            global_batch_size=MICRO_BATCH * MICRO_BATCHES,
        ),
        optim=OptimConfig(lr=1e-4),
    )


def transformers_step(dtype: str) -> Callable[[], float]:
    """One optimizer step of the peer: LlamaForCausalLM, SDPA attention, torch's fused AdamW, clipping at 1."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=MODEL.vocab_size,
            hidden_size=MODEL.hidden_size,
            intermediate_size=MODEL.ffn_hidden_size,
            num_hidden_layers=MODEL.num_layers,
            num_attention_heads=MODEL.num_heads,
            max_position_embeddings=MODEL.max_seq_len,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    if dtype == "bf16":
        model = model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=True
    )
    data = batches()

    def step() -> float:
        total = 0.0
        for batch in data:
            logits = model(input_ids=batch.tokens_BS).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.labels_BS.flatten())
            (loss / len(data)).backward()
            total += float(loss.detach()) / len(data)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


@contextlib.contextmanager
def timed_parts(engine: Engine) -> Iterator[dict[str, float]]:
    """Seconds that our steps within the block spend in forward, backward and optimizer."""
    spent = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}

    def timed(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - begun

        return call

    from megatron.core.pipeline_parallel import schedules

    adam = engine._zero.optimizer.optimizer
    module = engine._stage.module
    with contextlib.ExitStack() as stack:
        for owner, attribute, name in (
            (module, "forward", "forward"),
            (schedules, "backward_step", "backward"),
            (adam, "step", "optimizer"),
        ):
            original = getattr(owner, attribute)
            setattr(owner, attribute, timed(name, original))
            stack.callback(setattr, owner, attribute, original)
        yield spent


def training_shares(dtype: str, *, steps: int) -> dict[str, float]:
    """Shares of a whole run from its first step to its last: data, metrics and hooks count, checkpoints do not."""
    from megallama.train import Trainer

    shares: dict[str, float] = {}
    fit = Loop.fit

    def timed_fit(self: Loop) -> bool:
        with timed_parts(self.engine) as spent:  # type: ignore[arg-type]
            begun = time.perf_counter()
            is_complete = fit(self)
            total = time.perf_counter() - begun
        shares.update({name: seconds / total for name, seconds in spent.items()})
        return is_complete

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        prefix = Path(folder) / "train"
        write_tokens(prefix, vocab_size=MODEL.vocab_size, documents=2000, length=300)
        config = dataclasses.replace(
            run_config(dtype),
            data=DataConfig(sources=[SourceConfig(path=str(prefix))]),
            checkpoint=CheckpointConfig(interval=0),
            log=LogConfig(wandb=WandbMode.disabled),
        )
        train = dataclasses.replace(config.train, steps=steps, run_dir=f"{folder}/run")
        Loop.fit = timed_fit  # type: ignore[method-assign]
        try:
            Trainer.from_config(dataclasses.replace(config, train=train)).fit()
        finally:
            Loop.fit = fit  # type: ignore[method-assign]
    return shares


def compare(dtype: str, *, rounds: int, block: int, with_profile: bool) -> None:
    """Alternate blocks of steps and print the table."""
    tokens = MICRO_BATCH * MICRO_BATCHES * SEQ_LEN
    config = run_config(dtype)
    peer = transformers_step(dtype)
    with connect(config.parallel, environment=read_launch_environment()) as topology:
        engine = build_run_engine(config, topology)
        data = batches()
        steps = iter(range(10_000))

        def ours() -> float:
            return engine.train_step(next(steps), data).loss

        for _ in range(2):
            ours(), peer()
        ours_s, peer_s = [], []
        for _ in range(rounds):
            for step, seconds in ((ours, ours_s), (peer, peer_s)):
                begun = time.perf_counter()
                for _ in range(block):
                    step()
                seconds.append((time.perf_counter() - begun) / block)
        ratios = [p / o for o, p in zip(ours_s, peer_s, strict=True)]
        print(
            f"{dtype}: megallama {tokens / statistics.median(ours_s):8.0f} tokens/s,"
            f" transformers {tokens / statistics.median(peer_s):8.0f} tokens/s,"
            f" ratio {statistics.median(ratios):.2f} (rounds {min(ratios):.2f} to {max(ratios):.2f})"
        )
        if with_profile:
            for name, step in (("megallama", ours), ("transformers", peer)):
                with torch.profiler.profile() as profile:
                    step()
                print(name)
                print(
                    profile.key_averages().table(
                        sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=60
                    )
                )


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--block", type=int, default=3, help="steps of one alternation")
    parser.add_argument("--steps", type=int, default=12, help="steps of the run that shares are taken of")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    print(
        f"{count_parameters(MODEL, padded=True) / 1e6:.1f}M parameters, seq {SEQ_LEN},"
        f" {MICRO_BATCHES} x {MICRO_BATCH} sequences a step, {torch.get_num_threads()} threads,"
        f" torch {torch.__version__}"
    )
    for dtype in arguments.dtype:
        compare(dtype, rounds=arguments.rounds, block=arguments.block, with_profile=arguments.profile)
        shares = training_shares(dtype, steps=arguments.steps)
        print(f"   shares of a run of {arguments.steps} steps through the trainer: ", end="")
        print(", ".join(f"{name} {share:.1%}" for name, share in shares.items()), end="")
        print(f"; outside of these {1 - sum(shares.values()):.1%}")


if __name__ == "__main__":
    main()
