"""What saving and loading cost: the stall of a background save, and throughput against the disk's own.

    python benchmarks/checkpoint.py [--gigabytes 1.2] [--rounds 3] [--minutes 4] [--folder FOLDER]

One process holds a model of linear layers with AdamW: 12 bytes a parameter are saved (fp32 weights and both
moments), by megallama and by plain torch.distributed.checkpoint (its FileSystemWriter and FileSystemReader as they
come), and by the floor: the same bytes written with write() and fsync() to one file, and read again. All take turns
in one run, and files are dropped from the page cache before they are read. megallama computes a BLAKE3 of every
byte, and compares it before a resume; the others do not. Put FOLDER on the disk that is of interest. Each number is
printed when it is there; no round begins that would end after --minutes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from megallama.checkpoint.distributed.background import BackgroundSaver
from megallama.checkpoint.distributed.store import load_checkpoint, save_checkpoint
from megallama.checkpoint.format.boxes import DEFAULT_CAP_ELEMENTS, BoxedTensor, split_range
from megallama.checkpoint.format.integrity import latest_checkpoint

WIDTH = 1024
BLOCK_BYTES = 8 << 20
BYTES_PER_PARAMETER = 12


class Work:
    """A model whose training is interrupted: linear layers and AdamW on `tokens` random vectors a step."""

    def __init__(self, *, gigabytes: float, tokens: int) -> None:
        count = max(1, round(gigabytes * 1e9 / BYTES_PER_PARAMETER / WIDTH**2))
        self.model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count)))
        for weight in self.model.parameters():
            # Or numbers shrink from layer to layer to denormal ones, which take a CPU a hundred times as long.
            torch.nn.init.normal_(weight, std=WIDTH**-0.5)
        self.adam = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.batch = torch.randn(tokens, WIDTH)
        self.step()

    def step(self) -> float:
        """One optimizer step; its seconds."""
        began = time.perf_counter()
        self.model(self.batch).square().mean().backward()
        self.adam.step()
        self.adam.zero_grad()
        return time.perf_counter() - began

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is saved, by canonical name."""
        found = {}
        for name, parameter in self.model.named_parameters():
            state = self.adam.state[parameter]
            found[f"fp32/{name}"] = parameter.detach()
            found[f"exp_avg/{name}"] = state["exp_avg"]
            found[f"exp_avg_sq/{name}"] = state["exp_avg_sq"]
        return found


def boxes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, BoxedTensor]:
    """The whole tensors as one rank of training would cut them."""
    boxed = {}
    for key, tensor in tensors.items():
        shape, flat, position, boxes = tuple(tensor.shape), tensor.reshape(-1), 0, {}
        for offset, size in split_range(shape, 0, flat.numel(), cap_elements=DEFAULT_CAP_ELEMENTS):
            length = torch.Size(size).numel()
            boxes[offset] = flat[position : position + length].view(size)
            position += length
        boxed[key] = BoxedTensor(key, shape, tensor.dtype, True, boxes)
    return boxed


def write_plain(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """The floor of a save."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for tensor in tensors.values():
        raw = tensor.reshape(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(raw), BLOCK_BYTES):
            block = raw[begin : begin + BLOCK_BYTES]
            while block:
                block = block[os.write(fd, block) :]
    os.fsync(fd)
    os.close(fd)


def read_plain(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """The floor of a load: into the tensors themselves."""
    with open(path, "rb", buffering=0) as file:
        for tensor in tensors.values():
            raw = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
            while raw:
                raw = raw[file.readinto(raw) or len(raw) :]


def drop_from_cache(path: Path) -> None:
    """Reads of `path` come from the disk again."""
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@torch.no_grad()
def spoiled(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Room for a load, so that what was not read is seen."""
    return {key: torch.full_like(tensor, torch.nan) for key, tensor in tensors.items()}


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a call: by the clock, and of this process on all cores."""
    began, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - began, time.process_time() - cpu


def both(name: str, function: Callable[[], object]) -> Iterator[tuple[str, float]]:
    """The two times of a call under their names."""
    wall, cpu = timed(function)
    yield name, wall
    yield f"{name}, CPU", cpu


def one_round(work: Work, folder: Path, saver: BackgroundSaver, number: int) -> Iterator[tuple[str, float]]:
    """(what, seconds) of everything once; CPU seconds under the name with ", CPU"."""
    tensors = work.tensors()
    boxes, room = boxes_of(tensors), spoiled(tensors)
    plain, ours, theirs = folder / "plain", folder / "ours", folder / "theirs"
    yield from both("write plain", lambda: write_plain(tensors, plain))
    yield from both(
        "save megallama",
        lambda: save_checkpoint(ours, step=number, tensors=boxes, state={}, model={}, keep=0),
    )
    yield from both(
        "save torch",
        lambda: dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(theirs, overwrite=True)),
    )
    path = ours / f"step-{number:08d}"
    for name, source, function in (
        ("read plain", plain, lambda: read_plain(room, plain)),
        ("verify megallama", path, lambda: latest_checkpoint(ours, log=print)),
        ("load megallama", path, lambda: load_checkpoint(path, tensors=boxes_of(room), model={})),
        ("load torch", theirs, lambda: dcp.load(room, storage_reader=dcp.FileSystemReader(theirs))),
    ):
        drop_from_cache(source)
        for tensor in room.values():
            tensor.fill_(torch.nan)
        yield from both(name, function)
        if name.startswith(("read", "load")):
            assert all(torch.equal(room[key], tensor) for key, tensor in tensors.items()), name
    yield from both("resume megallama", lambda: resume(ours, path, room))
    shutil.rmtree(ours)
    shutil.rmtree(theirs)
    plain.unlink()
    yield from background(work, folder, saver, number)


def resume(ours: Path, path: Path, room: dict[str, torch.Tensor]) -> None:
    """Verification and load in a row, from the disk: what a resumed run does."""
    drop_from_cache(path)
    latest_checkpoint(ours, log=print)
    load_checkpoint(path, tensors=boxes_of(room), model={})


def background(work: Work, folder: Path, saver: BackgroundSaver, number: int) -> Iterator[tuple[str, float]]:
    """Stalls, and what the steps beside a save cost."""
    yield "step alone", statistics.median(work.step() for _ in range(3))
    tensors = work.tensors()
    ours, theirs = folder / "background", folder / "theirs"
    for name, begin, is_done, finish in (
        (
            "megallama",
            lambda: saver.start(step=number, tensors=boxes_of(tensors), state={}),
            lambda _: not saver.is_running,
            lambda _: saver.wait(),
        ),
        (
            "torch",
            lambda: dcp.async_save(
                dict(tensors), storage_writer=dcp.FileSystemWriter(theirs, overwrite=True)
            ),
            lambda future: future.done(),
            lambda future: future.result(),
        ),
    ):
        began = time.perf_counter()
        pending = begin()
        yield f"stall {name}", time.perf_counter() - began
        beside = [work.step()]
        while not is_done(pending):
            beside.append(work.step())
        ended = time.perf_counter()
        outcome = finish(pending)
        assert getattr(outcome, "problem", None) is None, outcome
        yield f"background save {name}", ended - began
        yield f"step beside {name}", statistics.mean(beside)
    shutil.rmtree(theirs)
    shutil.rmtree(ours)


def report(seconds: Mapping[str, list[float]], size_bytes: int) -> None:
    """The table, and the ratios that matter (medians of the ratios of each round)."""
    print(f"{'':28}{'seconds (median, of all rounds)':>40}{'GB/s':>8}")
    for name, values in seconds.items():
        rate = (
            ""
            if name.startswith(("step", "stall")) or name.endswith("CPU")
            else f"{size_bytes / 1e9 / statistics.median(values):.2f}"
        )
        shown = ", ".join(f"{value:.3f}" for value in values)
        print(f"{name:28}{statistics.median(values):10.3f}  ({shown}){rate:>8}")

    def ratio(of: str, to: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[of], seconds[to], strict=True))

    print(f"stall of a background save as a share of a step: {ratio('stall megallama', 'step alone'):.3f}")
    print(f"  the same of torch's async_save:                {ratio('stall torch', 'step alone'):.3f}")
    print(f"  torch's stall / ours:                          {ratio('stall torch', 'stall megallama'):.2f}")
    print(
        f"a step beside a save / alone:                    {ratio('step beside megallama', 'step alone'):.2f}"
    )
    print(f"  the same of torch:                             {ratio('step beside torch', 'step alone'):.2f}")
    print(f"write throughput / the disk's:                   {ratio('write plain', 'save megallama'):.2f}")
    print(f"  the same of torch:                             {ratio('write plain', 'save torch'):.2f}")
    print(f"  ours / torch's:                                {ratio('save torch', 'save megallama'):.2f}")
    print(
        f"  CPU time of a save, ours / torch's:            {ratio('save megallama, CPU', 'save torch, CPU'):.2f}"
    )
    print(f"read throughput / the disk's (load):             {ratio('read plain', 'load megallama'):.2f}")
    print(f"  with the checksums (resume):                   {ratio('read plain', 'resume megallama'):.2f}")
    print(f"  the same of torch, which has none:             {ratio('read plain', 'load torch'):.2f}")


def main() -> None:
    """Run the rounds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.2, help="of state (default 1.2)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=4.0, help="no round begins that would end later (4)")
    parser.add_argument("--tokens", type=int, default=512, help="of a step (default 512)")
    parser.add_argument("--folder", type=Path, default=Path("."), help="on the disk that is measured")
    options = parser.parse_args()
    began = time.perf_counter()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    work = Work(gigabytes=options.gigabytes, tokens=options.tokens)
    size_bytes = sum(tensor.nbytes for tensor in work.tensors().values())
    print(
        f"{size_bytes / 1e9:.2f} GB of state, up to {options.rounds} rounds, {torch.get_num_threads()} threads"
    )
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="checkpoint-benchmark-") as name:
        folder = Path(name)
        saver = BackgroundSaver(folder / "background", model={}, keep=0, group=dist.new_group(backend="gloo"))
        saver.reserve(boxes_of(work.tensors()))
        # The first round pays for imports and first pages, and does not count unless time allows no other.
        for number in range(options.rounds + 1):
            passed_s = time.perf_counter() - began
            if number and passed_s * (number + 1) / number > 60 * options.minutes:
                print(f"{passed_s:.0f} s: no time for another round", flush=True)
                break
            if number == 1:
                seconds.clear()
            for what, value in one_round(work, folder, saver, number + 1):
                seconds[what].append(value)
                print(f"  round {number}  {what:28}{value:10.3f} s", flush=True)
    report(seconds, size_bytes)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
