"""`megallama generate`: continues a prompt."""

from __future__ import annotations

import argparse
from pathlib import Path

from megallama.commands.parser import Commands, text, whole_number


def add(commands: Commands) -> None:
    """Add `megallama generate` to the command line."""
    generate = commands.add_parser("generate", help="continue a prompt with the newest checkpoint of a run")
    generate.add_argument("run_dir", type=Path, help="folder of a run, or of an imported model")
    generate.add_argument("--prompt", type=text, required=True)
    generate.add_argument("--max-new-tokens", type=whole_number(least=0), default=200)
    generate.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    generate.add_argument(
        "--top-k", type=whole_number(least=0), default=0, help="only the k likeliest tokens; 0: all"
    )
    generate.add_argument(
        "--top-p", type=float, default=1.0, help="only the likeliest tokens of this total probability"
    )
    generate.add_argument("--seed", type=whole_number(least=0), default=0)
    generate.set_defaults(command=_generate)


def _generate(options: argparse.Namespace) -> None:
    from megallama.generate import Sampling, generate

    sampling = Sampling(
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed
    )
    parts = generate(
        options.run_dir, options.prompt, max_new_tokens=options.max_new_tokens, sampling=sampling
    )
    first = next(parts, "")  # errors come before the prompt is shown
    print(options.prompt, end="")
    print(first, end="", flush=True)
    for part in parts:
        print(part, end="", flush=True)
    print()
