"""Loading and offline access take a bounded amount of memory beside what is filled."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from megallama.checkpoint.boxes import BoxedTensor, split_range
from megallama.checkpoint.reader import CheckpointReader
from megallama.checkpoint.record import BoxRecord
from megallama.checkpoint.regions import read_region
from megallama.checkpoint.store import load_checkpoint, save_checkpoint
from megallama.checkpoint.verify import verify_checkpoint
from megallama.checkpoint.writer import CheckpointWriter
from tests.ranks import run_ranks

SHAPE = (4096, 8192)
"""128 MiB of fp32."""
LIMIT_MIB = 64
"""Buffers of 8 MiB, some of which the allocator keeps; half of the tensor."""


def extra_mib(function: Callable[[], object]) -> float:
    """How far the resident memory rises above what it was while `function` runs."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status_mib("VmRSS")
    function()
    return _status_mib("VmHWM") - before


def _status_mib(key: str) -> float:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def boxes(whole: torch.Tensor, *, cap: int | None) -> dict[str, BoxedTensor]:
    flat, position, parts = whole.view(-1), 0, {}
    for offset, shape in split_range(SHAPE, 0, whole.numel(), cap_elements=cap):
        size = shape[0] * shape[1]
        parts[offset] = flat[position : position + size].view(shape)
        position += size
    return {"fp32/w": BoxedTensor("fp32/w", SHAPE, torch.float32, True, parts)}


def measure(folder: Path) -> dict[str, float]:
    """In a process of its own, since a peak is a process's."""
    whole = torch.rand(SHAPE)
    found = {}
    found["save"] = extra_mib(
        lambda: save_checkpoint(folder, step=1, tensors=boxes(whole, cap=1 << 21), state={}, model={}, keep=0)
    )
    path = folder / "step-00000001"
    filled = torch.ones(SHAPE)
    target = boxes(filled, cap=1 << 21)
    found["load"] = extra_mib(lambda: load_checkpoint(path, tensors=target, model={}))
    assert torch.equal(filled, whole)
    found["verify"] = extra_mib(lambda: verify_checkpoint(path))
    reader = CheckpointReader(path)
    found["read a part"] = extra_mib(lambda: reader.read("fp32/w", offset=(0, 5), shape=(4096, 8)))
    with CheckpointWriter(folder, step=2, model={}, state={}) as writer:
        found["write"] = extra_mib(lambda: writer.write("fp32/w", whole))
    one_box = folder / "one box"
    one_box.write_bytes(memoryview(whole.numpy()))
    columns = torch.zeros(4096, 100)
    with one_box.open("rb") as stream:
        record = BoxRecord(0, 0, (0, 0), SHAPE)
        found["columns of a large box"] = extra_mib(
            lambda: read_region(stream.fileno(), record, starts=(0, 7), target=columns, name="one box")
        )
    assert torch.equal(columns, whole[:, 7:107])
    return found


def test_memory_beside_what_is_filled(tmp_path: Path) -> None:
    [found] = run_ranks(1, measure, tmp_path)
    assert max(found.values()) < LIMIT_MIB, found
