"""The pipeline bubble of our real schedule, with stages that only take time, on gloo ranks.

    python benchmarks/pipeline_bubble.py [--forward-ms 200] [--backward-ms 400]

Each chunk sleeps in its forward and in its backward; activations and gradients travel as in training. Every rank
traces when it was busy. The bubble is (time of the step - busy time) / busy time, averaged over the ranks; theory
says (pp - 1) / (m x vp) for m micro-batches. What is measured beyond that is the time of messages and of Python.
The same stages on a virtual clock (each message carries the time at which it was ready) leave that out.
"""

from __future__ import annotations

import argparse
import functools
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType

from megallama.config.schema import (
    Dtype,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)
from megallama.engine.schedule import ScheduledChunk, run_schedule
from megallama.host.launch import read_launch_environment
from megallama.host.ranks import run_ranks, start_forkserver
from megallama.model.build import transformer_config
from megallama.topology.connect import connect

LAYOUTS = ((2, 1, 8), (4, 1, 8), (4, 1, 16), (2, 2, 8), (2, 4, 8), (4, 2, 8))
"""(pp, vp, micro-batches) of each row."""

SEQ_LEN, HIDDEN = 8, 16


@dataclass
class Clock:
    """Time of one rank: its own, or what the work so far would have taken."""

    is_virtual: bool
    now_s: float = 0.0
    trace: list[tuple[float, float]] = field(default_factory=list)
    """(begin, end) of each piece of work, in seconds."""

    def work(self, seconds: float, *, ready_s: float) -> float:
        """Work that cannot begin before `ready_s` of the virtual clock; when it ends."""
        begin = max(self.now_s, ready_s) if self.is_virtual else time.perf_counter()
        if not self.is_virtual:
            time.sleep(seconds)
        self.now_s = begin + seconds if self.is_virtual else time.perf_counter()
        self.trace.append((begin, self.now_s))
        return self.now_s


class Work(torch.autograd.Function):
    """A forward and a backward that take time. The first element of what they pass on is when they ended."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, chunk: FakeChunk) -> torch.Tensor:
        """The time of a forward."""
        ctx.chunk = chunk
        return torch.full_like(x, chunk.clock.work(chunk.forward_s, ready_s=float(x.view(-1)[0])))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The time of a backward; on the last chunk the gradient comes from the loss, and is no time."""
        chunk = ctx.chunk
        ready_s = 0.0 if chunk.post_process else float(gradient.reshape(-1)[0])
        return torch.full_like(gradient, chunk.clock.work(chunk.backward_s, ready_s=ready_s)), None


class FakeChunk(torch.nn.Module):
    """A chunk without layers, with what the schedule asks of one."""

    def __init__(self, clock: Clock, *, vp_stage: int | None, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.clock, self.vp_stage, self.pre_process, self.post_process = clock, vp_stage, is_first, is_last
        self.model_type = ModelType.encoder_or_decoder
        self.forward_s = self.backward_s = 0.0
        self._input: torch.Tensor | None = None

    def set_input_tensor(self, tensor: Any) -> None:
        """Take the previous stage's output."""
        self._input = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        """The input after a while; per-token losses on the last chunk."""
        x = torch.zeros(SEQ_LEN, 1, HIDDEN, requires_grad=True) if self.pre_process else self._input
        output: torch.Tensor = Work.apply(x, self)
        return output.sum(-1).T if self.post_process else output


def measure(
    pp: int, vp: int, num_micro_batches: int, forward_s: float, backward_s: float, is_virtual: bool
) -> float:
    """The bubble of this rank as a share of its busy time."""
    config = RunConfig(
        model=ModelConfig(
            name="none",
            num_layers=pp * vp,
            hidden_size=HIDDEN,
            ffn_hidden_size=HIDDEN,
            num_heads=1,
            vocab_size=128,
            max_seq_len=SEQ_LEN,
        ),
        parallel=ParallelConfig(pp=pp, vp=vp),
        precision=PrecisionConfig(dtype=Dtype.fp32),
        train=TrainConfig(steps=1, run_dir="unused", seq_len=SEQ_LEN, global_batch_size=num_micro_batches),
    )
    tokens = torch.zeros(1, SEQ_LEN, dtype=torch.int64)
    batch: Any = SimpleNamespace(
        tokens_BS=tokens,
        labels_BS=tokens,
        loss_mask_BS=torch.ones(1, SEQ_LEN),
        positions_BS=tokens,
        document_starts=((0,),),
    )
    with connect(config.parallel, environment=read_launch_environment()) as topology:
        clock = Clock(is_virtual)
        fakes = [
            FakeChunk(
                clock,
                vp_stage=index if vp > 1 else None,
                is_first=topology.is_first_stage and index == 0,
                is_last=topology.is_last_stage and index == vp - 1,
            )
            for index in range(vp)
        ]
        transformer = transformer_config(
            config.model, parallel=config.parallel, precision=config.precision, train=config.train
        )
        stage: Any = SimpleNamespace(chunks=fakes, transformer=transformer)
        run = functools.partial(
            run_schedule,
            [ScheduledChunk(stage, i, lambda index, *a, **k: fakes[index](*a, **k)) for i in range(vp)],
            topology=topology,
            micro_batch_size=1,
            seq_len=SEQ_LEN,
            loss_factor=1.0,
            forward_only=False,
        )
        run([batch] * pp)  # connects the neighbours
        for fake in fakes:
            fake.forward_s, fake.backward_s = forward_s, backward_s
        clock.trace.clear()
        clock.now_s = 0.0
        dist.barrier()
        begin = 0.0 if is_virtual else time.perf_counter()
        run([batch] * num_micro_batches)
        dist.barrier()
        end = torch.tensor(clock.now_s if is_virtual else time.perf_counter(), dtype=torch.float64)
        dist.all_reduce(end, op=dist.ReduceOp.MAX)
        busy = sum(end - start for start, end in clock.trace)
        assert len(clock.trace) == 2 * vp * num_micro_batches, len(clock.trace)
        return (float(end) - begin - busy) / busy


def bubble(
    pp: int, vp: int, num_micro_batches: int, *, forward_s: float, backward_s: float, is_virtual: bool
) -> float:
    """Measured bubble as a share of the busy time, mean over the ranks."""
    shares = run_ranks(pp, measure, pp, vp, num_micro_batches, forward_s, backward_s, is_virtual)
    return sum(shares) / len(shares)


def theory(pp: int, vp: int, num_micro_batches: int) -> float:
    """The bubble of 1F1B and of the interleaved schedule (Narayanan et al. 2021, arXiv:2104.04473, section 2.2)."""
    return (pp - 1) / (num_micro_batches * vp)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--forward-ms", type=float, default=200.0)
    parser.add_argument("--backward-ms", type=float, default=400.0)
    arguments = parser.parse_args()
    times = dict(forward_s=arguments.forward_ms / 1e3, backward_s=arguments.backward_ms / 1e3)
    start_forkserver()
    print(
        "| pp | vp | m | (pp-1)/(m x vp) | virtual clock | asleep | difference |\n|---|---|---|---|---|---|---|"
    )
    for layout in LAYOUTS:
        exact, real = (bubble(*layout, **times, is_virtual=virtual) for virtual in (True, False))
        wanted = theory(*layout)
        cells = [*map(str, layout), *(f"{x:.4f}" for x in (wanted, exact, real)), f"{real - wanted:+.4f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
