"""`megallama data`: traces a step back to its text, and verifies prepared data."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megallama.commands.parser import Commands, whole_number
from megallama.host.errors import EXIT_DIFFERENT


def add(commands: Commands) -> None:
    """Add `megallama data` to the command line."""
    data = commands.add_parser("data", help="verify data, and look at what a run was trained on")
    parts = data.add_subparsers(metavar="COMMAND", required=True)
    trace = parts.add_parser("trace", help="the sequences of a step: source, file, document, text")
    trace.add_argument("run_dir", type=Path)
    trace.add_argument(
        "--step",
        type=whole_number(least=1),
        required=True,
        help="as the metrics count it; the first one is 1",
    )
    trace.add_argument(
        "--row",
        type=whole_number(least=0),
        default=None,
        help="only this sequence of the global batch, from 0",
    )
    trace.add_argument(
        "--chars", type=whole_number(least=0), default=60, help="characters of text of each document"
    )
    trace.add_argument("--json", action="store_true", help="one line of JSON a sequence")
    trace.set_defaults(command=_trace)
    verify = parts.add_parser(
        "verify",
        help="read every byte of prepared data; exit code 1 where something differs from its checksum",
    )
    verify.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="prefix, as in data.sources; folder of megallama prepare; or run folder: all that it was trained on",
    )
    verify.set_defaults(command=_verify)


def _trace(options: argparse.Namespace) -> None:
    from megallama.stream.trace import trace_step

    rows = None if options.row is None else range(options.row, options.row + 1)
    for sequence in trace_step(options.run_dir, step=options.step, rows=rows, chars=options.chars):
        if options.json:
            print(json.dumps(sequence.to_plain(), ensure_ascii=False))
            continue
        print(
            f"row {sequence.row}  sample {sequence.sample}  {sequence.source}"
            f"  epoch {sequence.epoch}  place {sequence.place}"
        )
        for part in sequence.documents:
            place = part.place
            shown = "ids " + " ".join(map(str, part.ids)) if part.text is None else _one_line(part.text)
            origin = f"  from {part.origin}" if part.origin else ""
            print(
                f"  {part.position:6} +{part.tokens:<6} {place.file}  document {place.document}"
                f"  token {place.offset}{origin}"
            )
            print(f"         {shown}")


def _verify(options: argparse.Namespace) -> int:
    from megallama.metrics.progress import progress_bar
    from megallama.stream.locate import prefixes_at
    from megallama.tokens.checksums import compare_checksums, compared_bytes

    prefixes = list(dict.fromkeys(prefix for path in options.paths for prefix in prefixes_at(path)))
    sizes = {prefix: compared_bytes(prefix) for prefix in prefixes}
    is_damaged, done = False, 0
    for prefix, size in sizes.items():
        problems: list[str] = []
        with progress_bar("reading") as progress:
            for count in compare_checksums(prefix, problems):
                done += count
                progress(done, sum(sizes.values()))
        is_damaged |= bool(problems)
        sound = f"ok ({size / 1e9:.3g} GB)" if size else "no manifest: only its index and sizes are compared"
        print(f"{prefix}: {'damaged (' + '; '.join(problems) + ')' if problems else sound}", flush=True)
    return EXIT_DIFFERENT if is_damaged else 0


def _one_line(text: str) -> str:
    """The text with line ends and tabs as escapes; all else, Chinese too, as it is."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
