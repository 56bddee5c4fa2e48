"""Peak memory and time of attention, forward and backward, against the length of the sequence.

    python benchmarks/attention_memory.py [--lengths 1024 2048 ... 32768] [--heads 1] [--width 16]

Rows: one document, documents of 100 tokens, and with `--masked` the mask written out for comparison (quadratic,
so up to 4096 tokens). Bytes are those that torch allocates in this process between the
start and the peak, inputs left out, so they do not depend on the machine. Linear means: bytes per token stay.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from megallama.kernels.attention.core import Attention, masked_attention
from megallama.kernels.attention.plan import DocumentStarts

LENGTHS = [1024 << k for k in range(6)]
"""1K to 32K tokens."""


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes that torch held at once on the host during `function`, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = function()
    del result
    changes = [
        (event.start_ns(), event.nbytes())
        for event in trace.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak


def attention_pass(
    attention: Callable[..., torch.Tensor],
    seq_len: int,
    *,
    heads: int,
    width: int,
    documents: DocumentStarts | None,
) -> Callable[[], object]:
    """Forward and backward over fresh random inputs, to be called once."""
    torch.manual_seed(0)
    inputs = [torch.randn(seq_len, 1, heads, width, requires_grad=True) for _ in range(3)]
    grad = torch.randn(seq_len, 1, heads, width)

    def run() -> object:
        out = attention(*inputs, scale=width**-0.5, documents=documents)
        return torch.autograd.grad(out, inputs, grad)

    return run


def documents_of(seq_len: int, length: int | None) -> DocumentStarts | None:
    """Documents of `length` tokens; None: one."""
    return (tuple(range(0, seq_len, length)),) if length else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--masked", action="store_true", help="also the mask written out, up to 4096 tokens")
    arguments = parser.parse_args()
    shape = {"heads": arguments.heads, "width": arguments.width}
    print(f"{'tokens':>8} {'documents':>10} {'kernel':>7} {'peak MiB':>9} {'bytes/token':>12} {'seconds':>8}")
    for seq_len in arguments.lengths:
        for length in (None, 100):
            documents = documents_of(seq_len, length)
            kernels = {"fused": Attention("sdpa")}
            if arguments.masked and seq_len <= 4096:
                kernels["masked"] = masked_attention
            for name, attention in kernels.items():
                run = attention_pass(attention, seq_len, documents=documents, **shape)
                start = time.perf_counter()
                peak = peak_bytes(run)
                seconds = time.perf_counter() - start
                count = len(documents[0]) if documents else 1
                row = f"{seq_len:>8} {count:>10} {name:>7} {peak / 2**20:>9.2f}"
                print(f"{row} {peak / seq_len:>12.0f} {seconds:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
