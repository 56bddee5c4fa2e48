"""`megallama plot`: plots the loss curve of a run."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from megallama.commands.parser import Commands, positive_number


def add(commands: Commands) -> None:
    """Add `megallama plot` to the command line."""
    plot = commands.add_parser("plot", help="draw the loss of a run")
    plot.add_argument("run_dir", type=Path)
    plot.add_argument("--output", type=Path, default=None, help="PNG file (default: RUN_DIR/loss.png)")
    plot.add_argument(
        "--unigram-perplexity",
        type=positive_number,
        default=None,
        help="draw the level of guessing by frequency alone",
    )
    plot.set_defaults(command=_plot)


def _plot(options: argparse.Namespace) -> None:
    from megallama.metrics.plot import plot_loss

    output = options.output or options.run_dir / "loss.png"
    level = options.unigram_perplexity
    plot_loss(options.run_dir, output, unigram_loss=math.log(level) if level else None)
    print(f"wrote {output}")
