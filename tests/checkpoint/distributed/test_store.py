"""Saving and loading across layouts and numbers of ranks."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3

from megallama.checkpoint.distributed.store import load_checkpoint, save_checkpoint
from megallama.checkpoint.format import disk, regions
from megallama.checkpoint.format.boxes import BoxedTensor, split_range
from megallama.checkpoint.format.integrity import verify_checkpoint
from megallama.checkpoint.format.protocol import read_index, read_manifest
from megallama.checkpoint.format.record import BoxRecord
from megallama.checkpoint.format.regions import read_region
from megallama.host.errors import CheckpointError, UserError
from tests.checkpoint.ranks_at_work import (
    load,
    load_of_another_model,
    load_on_rank,
    save,
    save_on_rank,
    save_on_subgroup,
)
from tests.checkpoint.synthetic import MODEL, SHAPES, STATE, Layout, canonical
from tests.support.ranks import run_ranks

ONE = Layout(1, 1)


@pytest.fixture(scope="module")
def saved_by_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    paths = run_ranks(4, save_on_rank, tmp_path_factory.mktemp("four"), Layout(2, 2), 5)
    assert len(set(paths)) == 1
    return Path(paths[0])


@pytest.mark.parametrize("layout", [Layout(2, 1), Layout(1, 2), Layout(2, 1, False)])
def test_four_ranks_save_and_two_of_another_layout_load(saved_by_four: Path, layout: Layout) -> None:
    assert verify_checkpoint(saved_by_four) == []
    assert run_ranks(2, load_on_rank, saved_by_four, layout) == [(0, STATE)] * 2


def test_four_ranks_save_and_one_process_loads(saved_by_four: Path) -> None:
    assert load(saved_by_four, ONE) == (0, STATE)


def test_one_process_saves_and_four_ranks_load(tmp_path: Path) -> None:
    path = save(tmp_path, ONE, 5)
    assert run_ranks(4, load_on_rank, path, Layout(1, 4)) == [(0, STATE)] * 4


def test_replicas_are_written_once(tmp_path: Path) -> None:
    path = Path(run_ranks(2, save_on_rank, tmp_path, Layout(1, 2, False), 5)[0])
    assert sorted(file.name for file in path.iterdir()) == ["index.json", "manifest.json", "rank-00000.bin"]
    assert load(path, ONE) == (0, STATE)


def test_a_group_of_some_ranks_saves_and_loads(tmp_path: Path) -> None:
    assert [wrong for _, wrong in run_ranks(3, save_on_subgroup, tmp_path)] == [0, 0, 0]
    assert load(tmp_path / "step-00000001", ONE) == (0, STATE)


def test_every_bit_pattern_and_dtype_survives(tmp_path: Path) -> None:
    tensors = {
        "fp32/nan": torch.tensor([math.nan, -math.inf, -0.0, 1e-45]),
        "fp32/half": torch.arange(9, dtype=torch.bfloat16).view(3, 3),
        "fp32/fp16": torch.tensor([[0.1]], dtype=torch.float16),
        "fp32/scalar": torch.tensor(3.25, dtype=torch.float64),
    }
    boxes = {key: _whole(key, tensor) for key, tensor in tensors.items()}
    path = save_checkpoint(tmp_path, step=0, tensors=boxes, state={}, model={}, keep=0)
    loaded = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    load_checkpoint(path, tensors={key: _whole(key, t) for key, t in loaded.items()}, model={})
    for key, tensor in tensors.items():
        assert loaded[key].dtype == tensor.dtype
        assert (
            loaded[key].reshape(-1).view(torch.uint8).tolist()
            == tensor.reshape(-1).view(torch.uint8).tolist()
        )


@pytest.mark.parametrize("seed", range(60))
def test_any_part_of_a_stored_box(tmp_path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    shape = tuple(draw(1, 5) for _ in range(draw(0, 3))) + (draw(1, 1200),) * draw(0, 1)
    starts = tuple(draw(0, size - 1) for size in shape)
    part = tuple(draw(1, size - start) for size, start in zip(shape, starts, strict=True))
    stored = torch.randn(shape, generator=generator)
    file = tmp_path / "box"
    file.write_bytes(b"x" * 64 + stored.reshape(-1).numpy().tobytes())
    whole = torch.full((*part, 2), math.nan)
    with file.open("rb") as stream:
        for target in (torch.full(part, math.nan), whole[..., 0]):
            read_region(
                stream.fileno(), BoxRecord(0, 64, (), shape), starts=starts, target=target, name="box"
            )
            wanted = stored[tuple(slice(o, o + s) for o, s in zip(starts, part, strict=True))]
            assert torch.equal(target, wanted)
    assert whole[..., 1].isnan().all()


def test_a_reader_of_part_of_a_box_reads_only_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.arange(64 * 4096, dtype=torch.float32).view(64, 4096)
    path = save_checkpoint(
        tmp_path, step=1, tensors={"fp32/w": _whole("fp32/w", whole)}, state={}, model={}, keep=0
    )
    read: list[int] = []

    def counting(fd: int, buffer: memoryview, *, position: int, name: str) -> None:
        read.append(len(buffer))
        disk.read_exactly(fd, buffer, position=position, name=name)

    monkeypatch.setattr(regions, "read_exactly", counting)
    for part, bytes_read in (((slice(10, 12),), 2 * 16384), ((slice(None), slice(0, 2048)), 64 * 8192)):
        read.clear()
        view = torch.zeros(whole[part].shape)
        offset = tuple(s.start or 0 for s in part) + (0,) * (2 - len(part))
        boxes = {"fp32/w": BoxedTensor("fp32/w", (64, 4096), torch.float32, True, {offset: view})}
        load_checkpoint(path, tensors=boxes, model={})
        assert torch.equal(view, whole[part])
        assert sum(read) == bytes_read


def test_another_model_is_refused_with_the_differing_keys(saved_by_four: Path) -> None:
    with pytest.raises(UserError) as failure:
        load_checkpoint(saved_by_four, tensors={}, model={**MODEL, "hidden_size": 32, "vocab_size": 7})
    text = str(failure.value)
    assert "hidden_size: 16 there, 32 here" in text and "vocab_size: nothing there, 7 here" in text
    assert "num_layers" not in text
    results = run_ranks(2, load_of_another_model, saved_by_four, Layout(2, 1), {**MODEL, "num_layers": 9})
    assert [kind for kind, _ in results] == ["UserError"] * 2
    assert all("num_layers: 1 there, 9 here" in text for _, text in results)


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tensors = {key: _whole(key, torch.ones(4, 2)) for key in ("fp32/a", "fp32/b")}
    path = save_checkpoint(tmp_path, step=1, tensors=tensors, state={}, model={}, keep=0)
    cases = {
        r"lacks tensors \(fp32/c\)": {**tensors, "fp32/c": _whole("fp32/c", torch.ones(1))},
        r"this model lacks \(fp32/b\)": {"fp32/a": tensors["fp32/a"]},
        r"fp32/b .*\(4, 2\).*\(2, 4\)": {**tensors, "fp32/b": _whole("fp32/b", torch.ones(2, 4))},
        r"fp32/b .*float32.*float64": {**tensors, "fp32/b": _whole("fp32/b", torch.ones(4, 2).double())},
    }
    for text, wanted in cases.items():
        with pytest.raises(UserError, match=text):
            load_checkpoint(path, tensors=wanted, model={})


def test_a_save_that_lacks_an_element_is_refused(tmp_path: Path) -> None:
    part = BoxedTensor("fp32/a", (4, 2), torch.float32, True, {(0, 0): torch.ones(3, 2)})
    with pytest.raises(CheckpointError, match="fp32/a: boxes hold 6 of 8"):
        save_checkpoint(tmp_path, step=1, tensors={"fp32/a": part}, state={}, model={}, keep=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("state", [{"a": (1, 2)}, {"a": math.nan}, {"a": torch.ones(1)}, {1: "a"}])
def test_state_that_would_come_back_changed_is_refused(tmp_path: Path, state: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="state of a checkpoint must be plain JSON"):
        save_checkpoint(tmp_path / "new", step=1, tensors={}, state=state, model={}, keep=0)
    assert not (tmp_path / "new").exists()


def test_the_specification_suffices_to_read_a_checkpoint(saved_by_four: Path) -> None:
    """A reader written from docs/checkpoint-format.md alone, with nothing of megallama."""
    raw = (saved_by_four / "manifest.json").read_bytes()
    manifest = json.loads(raw)
    head = raw[: raw.rindex(b'"checksum"')]
    assert manifest["checksum"] == blake3(head).hexdigest()
    assert (manifest["format"], manifest["version"], manifest["step"]) == ("megallama-checkpoint", 2, 5)
    assert (manifest["state"], manifest["model"]) == (STATE, MODEL)
    assert sorted(manifest["files"]) == ["index.json", *(f"rank-{n:05d}.bin" for n in range(4))]
    for name, entry in manifest["files"].items():
        content = (saved_by_four / name).read_bytes()
        assert len(content) == entry["bytes"]
        assert blake3(content).hexdigest() == entry["blake3"]
    tensors = json.loads((saved_by_four / "index.json").read_bytes())["tensors"]
    assert len(tensors) == 3 * len(SHAPES)
    for key, entry in tensors.items():
        assert entry["dtype"] == "float32"
        whole = np.full(entry["shape"], np.nan, dtype="<f4")
        for number, position, offset, shape in entry["boxes"]:
            assert position % 64 == 0
            content = (saved_by_four / f"rank-{number:05d}.bin").read_bytes()
            box = np.frombuffer(content, dtype="<f4", count=math.prod(shape), offset=position).reshape(shape)
            whole[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))] = box
        assert whole.tobytes() == canonical(key).numpy().tobytes(), key


def test_boxes_of_a_tensor_stand_together_and_follow_the_cap(saved_by_four: Path) -> None:
    index = read_index(saved_by_four, read_manifest(saved_by_four))
    assert all(math.prod(box.shape) <= 64 for record in index.values() for box in record.boxes)
    by_position = sorted(
        (box.file, box.position_bytes, key) for key, record in index.items() for box in record.boxes
    )
    keys = [(file, key) for file, _, key in by_position]
    assert keys == sorted(keys)


def _whole(key: str, tensor: torch.Tensor) -> BoxedTensor:
    if tensor.dim() == 0:
        return BoxedTensor(key, (), tensor.dtype, True, {(): tensor})
    shape = tuple(tensor.shape)
    [(offset, _)] = split_range(shape, 0, tensor.numel())
    return BoxedTensor(key, shape, tensor.dtype, True, {offset: tensor})
