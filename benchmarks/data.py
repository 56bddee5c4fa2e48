"""The data path against others, each figure as a ratio within this run.

    python benchmarks/data.py [--part preparation] [--part loader] [--megatron-path CHECKOUT] [--rounds 3]

Parts (default: both):
  preparation  tokenizing, MB/s of a core, against Hugging Face `datasets.map` and, where CHECKOUT is a clone of
               Megatron-LM (its tag core_v0.15.3 runs without a GPU), its `tools/preprocess_data.py`; see
               `data_preparation.py`. Needs the extra `bench` (`pip install -e .[bench]`).
  loader       against megatron-core's datasets: seconds and memory of indexing `--tokens` synthetic tokens, tokens/s,
               one batch at step 10 and at step 10 million; see `data_loader.py`.

Programs alternate, each in processes of their own. On a machine that does other work compare only ratios.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("preparation", "loader")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; may be repeated")
    parser.add_argument("--rounds", type=int, default=3)
    preparation = parser.add_argument_group("preparation")
    preparation.add_argument("--megatron-path", type=Path, default=None, metavar="CHECKOUT")
    preparation.add_argument("--tokenizer", type=Path, default=None, help="a sentencepiece .model")
    preparation.add_argument("--copies", type=int, default=4, help="how often the corpora are repeated")
    loader = parser.add_argument_group("loader")
    loader.add_argument("--tokens", type=float, default=1e9, help="of both sources together")
    loader.add_argument("--mean-length", type=int, default=1000, help="tokens of a document")
    loader.add_argument("--seq-len", type=int, default=4096)
    loader.add_argument("--batch", type=int, default=64)
    loader.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from benchmarks.data_loader import compare_loaders
    from benchmarks.data_preparation import compare_preparations

    if "preparation" in (options.part or PARTS):
        megatron = options.megatron_path.resolve() if options.megatron_path else None
        for line in compare_preparations(
            megatron=megatron, tokenizer=options.tokenizer, copies=options.copies, rounds=options.rounds
        ):
            print(line, flush=True)
    if "loader" in (options.part or PARTS):
        for line in compare_loaders(
            tokens=int(options.tokens),
            mean_length=options.mean_length,
            seq_len=options.seq_len,
            batch=options.batch,
            steps=options.steps,
            rounds=options.rounds,
        ):
            print(line, flush=True)


if __name__ == "__main__":
    main()
