"""Loading and offline access take a bounded amount of memory beside what is filled."""

from __future__ import annotations

import filecmp
import json
import re
import resource
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from megallama.checkpoint.distributed.store import load_checkpoint, save_checkpoint
from megallama.checkpoint.format.boxes import BoxedTensor, split_range
from megallama.checkpoint.format.integrity import verify_checkpoint
from megallama.checkpoint.format.record import BoxRecord
from megallama.checkpoint.format.regions import read_region
from megallama.checkpoint.offline.reader import CheckpointReader
from megallama.checkpoint.offline.writer import CheckpointWriter
from tests.support.jobs import SMALL
from tests.support.ranks import run_ranks

SHAPE = (4096, 8192)
"""128 MiB of fp32."""
LIMIT_MIB = 64
"""Buffers of 8 MiB, some of which the allocator keeps; half of the tensor."""
STREAM_MIB = 96
"""Likewise where threads take turns: how much the allocator keeps is then a matter of luck."""


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


def within(mib: int, function: Callable[[], object]) -> None:
    """Run `function` with so much more memory of its own than there is now; what is resident does not matter."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmData:\s+(\d+) kB", status)
    assert found is not None
    limit = int(found[1]) * 1024 + (mib << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    try:
        function()
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def import_and_export(folder: Path) -> None:
    """A model whose embedding alone is 128 MiB, in and out again."""
    from megallama.config.load import load_config
    from megallama.huggingface.config import hugging_face_config
    from megallama.huggingface.export_model import export_model
    from megallama.huggingface.import_model import import_model
    from megallama.huggingface.names import hugging_face_tensors
    from megallama.huggingface.safetensors_folder import TensorToWrite, write_safetensors

    words = ["model=llama_tiny", "model.num_layers=1", "model.hidden_size=512", "model.vocab_size=65536"]
    words += ["model.tie_embeddings=true", *SMALL[3:], "train.run_dir=unused"]
    model = load_config(words).model
    source = folder / "source"
    source.mkdir()
    config = hugging_face_config(model, dtype="bfloat16", bos_id=None, eos_id=None)
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")

    def blocks(shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        yield from (torch.full((1, *shape[1:]), float(row)) for row in range(shape[0]))

    tensors = {
        name: TensorToWrite(made.shape, partial(blocks, made.shape))
        for name, made in hugging_face_tensors(model).items()
    }
    write_safetensors(source, tensors, dtype=torch.bfloat16, max_shard_bytes=1 << 40)
    torch.ones(2).sum()  # what starts at a first use is not ours
    mapped_mib = (
        source / "model.safetensors"
    ).stat().st_size >> 20  # by safetensors, as if it might write there
    within(STREAM_MIB + mapped_mib, lambda: import_model(source, folder / "imported"))
    within(STREAM_MIB, lambda: export_model(folder / "imported", folder / "exported"))
    assert filecmp.cmp(source / "model.safetensors", folder / "exported" / "model.safetensors", shallow=False)
    with pytest.raises(RuntimeError, match="allocate|memory"):
        within(STREAM_MIB, lambda: torch.ones(2, *SHAPE))


def test_import_and_export_hold_parts_of_a_tensor(tmp_path: Path) -> None:
    run_ranks(1, import_and_export, tmp_path)
