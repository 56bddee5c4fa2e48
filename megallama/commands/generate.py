"""`megallama generate`: continues a prompt."""

from __future__ import annotations

import argparse
from pathlib import Path

from megallama.commands.parser import Commands, text, whole_number
from megallama.tokenizers.begin import BEGINS


def add(commands: Commands) -> None:
    """Add `megallama generate` to the command line."""
    generate = commands.add_parser("generate", help="continue a prompt with the newest checkpoint of a run")
    generate.add_argument(
        "run_dir", type=Path, help="folder of a run, of an imported model or of a grown vocabulary"
    )
    generate.add_argument("--prompt", type=text, required=True)
    generate.add_argument("--max-new-tokens", type=whole_number(least=0), default=200)
    generate.add_argument(
        "--temperature", type=float, default=None, help="0: always the likeliest token (default: 0.8)"
    )
    generate.add_argument(
        "--top-k", type=whole_number(least=0), default=0, help="only the k likeliest tokens; 0: all"
    )
    generate.add_argument(
        "--top-p", type=float, default=1.0, help="only the likeliest tokens of this total probability"
    )
    generate.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="above 1: tokens of the text so far are less likely",
    )
    generate.add_argument(
        "--beams",
        type=whole_number(least=1),
        default=1,
        help="keep so many texts and take the likeliest (beam search)",
    )
    generate.add_argument(
        "--begin-token",
        choices=BEGINS,
        default=None,
        help="whether the prompt begins with the tokenizer's begin token (default: as the run's data, if they are still"
        " there, else where the tokenizer's files say so)",
    )
    generate.add_argument("--seed", type=whole_number(least=0), default=0)
    generate.set_defaults(command=_generate)


def _generate(options: argparse.Namespace) -> None:
    from megallama.generate import Sampling, generate

    usual = Sampling.temperature if options.beams == 1 else 0.0
    sampling = Sampling(
        temperature=usual if options.temperature is None else options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        beams=options.beams,
        seed=options.seed,
    )
    waiting = [options.prompt]  # errors come before the prompt is shown

    def show(part: str) -> None:
        print("".join(waiting) + part, end="", flush=True)
        waiting.clear()

    generate(
        options.run_dir,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        begin=options.begin_token,
        show=show,
    )
    print()
