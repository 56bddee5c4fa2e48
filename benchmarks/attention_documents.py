"""Time of attention over many short documents against one long one, forward and backward, on this machine's CPU.

    python benchmarks/attention_documents.py [--tokens 2048 8192] [--rounds 5] [--heads 8] [--kv-heads 4] [--width 64]

Each round times one long document and then every other packing of as many tokens, one after the other, by the time
that the process computes, so that other work on the machine counts little; the ratio is the median over rounds. The
first pass over a packing also makes its plan, which later layers and steps use again: it is a row of its own.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch

from megallama.kernels.attention.core import Attention
from megallama.kernels.attention.plan import DocumentStarts

LENGTHS = (4, 32, 200, 1000)
"""Tokens of the documents of a packing; a further one mixes lengths from 1 to 1000."""


def packings(tokens: int) -> dict[str, DocumentStarts | None]:
    """Document starts by what they are; None: one document."""
    found: dict[str, DocumentStarts | None] = {"one long": None}
    found |= {f"of {length}": (tuple(range(0, tokens, length)),) for length in LENGTHS}
    draw = random.Random(0)
    starts = [0]
    while (start := starts[-1] + round(1000 ** draw.random())) < tokens:
        starts.append(start)
    return found | {"of 1 to 1000": (tuple(starts),)}


def attention_pass(
    attention: Callable[..., torch.Tensor], tokens: int, *, heads: int, kv_heads: int, width: int
) -> Callable[[DocumentStarts | None], float]:
    """A function that runs forward and backward over documents and gives the seconds that this process computed."""
    torch.manual_seed(0)
    inputs = [torch.randn(tokens, 1, n, width, requires_grad=True) for n in (heads, kv_heads, kv_heads)]
    grad = torch.randn(tokens, 1, heads, width)

    def seconds(documents: DocumentStarts | None) -> float:
        start = time.process_time()
        out = attention(*inputs, scale=width**-0.5, documents=documents)
        torch.autograd.grad(out.flatten(), inputs, grad.flatten())
        return time.process_time() - start

    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    arguments = parser.parse_args()
    shape = {"heads": arguments.heads, "kv_heads": arguments.kv_heads, "width": arguments.width}
    print(f"{'tokens':>8} {'documents':>14} {'number':>7} {'first ms':>9} {'ms':>9} {'ratio':>6}")
    for tokens in arguments.tokens:
        seconds = attention_pass(Attention("sdpa"), tokens, **shape)
        seconds(None)  # the first call of all warms the allocator
        chosen = packings(tokens)
        first = {name: seconds(documents) for name, documents in chosen.items()}
        rounds = [
            {name: seconds(documents) for name, documents in chosen.items()} for _ in range(arguments.rounds)
        ]
        for name, documents in chosen.items():
            ratio = statistics.median(r[name] / r["one long"] for r in rounds)
            spent = statistics.median(r[name] for r in rounds)
            number = len(documents[0]) if documents else 1
            print(
                f"{tokens:>8} {name:>14} {number:>7} {first[name] * 1e3:>9.1f} {spent * 1e3:>9.1f} {ratio:>6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
