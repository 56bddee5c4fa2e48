"""A checkpoint read and written without process group: whole tensors, parts, damage, bounded memory."""

import math
import os
from pathlib import Path

import pytest
import torch

from megallama.checkpoint.format.integrity import locate_checkpoint, verify_checkpoint
from megallama.checkpoint.offline import reader as reader_module
from megallama.checkpoint.offline.reader import CheckpointReader
from megallama.checkpoint.offline.writer import CheckpointWriter
from megallama.host.errors import DamagedError, UserError
from tests.checkpoint.ranks_at_work import load, save_on_rank
from tests.checkpoint.synthetic import MODEL, SHAPES, STATE, Layout, canonical
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def saved_by_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(run_ranks(4, save_on_rank, tmp_path_factory.mktemp("四"), Layout(2, 2), 5)[0])


def test_what_is_stored(saved_by_four: Path) -> None:
    reader = CheckpointReader(saved_by_four)
    assert (reader.step, reader.model, reader.state) == (5, MODEL, STATE)
    assert reader.kinds == ["exp_avg", "exp_avg_sq", "fp32"]
    assert reader.names() == sorted(SHAPES) and len(reader.keys) == 3 * len(SHAPES)
    assert reader.shape("fp32/embedding") == (50, 16) and reader.dtype("fp32/embedding") == torch.float32
    assert reader.size_bytes == sum(
        file.stat().st_size for file in saved_by_four.iterdir() if file.name != "manifest.json"
    )


@pytest.mark.parametrize("verify", ["first", "lazily", "never"])
def test_whole_tensors(saved_by_four: Path, verify: str) -> None:
    tensors = dict(CheckpointReader(saved_by_four, verify=verify).read_all(kind="exp_avg"))  # type: ignore[arg-type]
    assert sorted(tensors) == sorted(SHAPES)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, canonical(f"exp_avg/{name}")), name


@pytest.mark.parametrize("seed", range(40))
def test_any_part_of_a_tensor(saved_by_four: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    reader = CheckpointReader(saved_by_four, verify="never")
    key = reader.keys[draw(0, len(reader.keys) - 1)]
    whole = reader.shape(key)
    offset = tuple(draw(0, extent) for extent in whole)
    shape = tuple(draw(0, extent - start) for extent, start in zip(whole, offset, strict=True))
    wanted = canonical(key)[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))]
    assert torch.equal(reader.read(key, offset=offset, shape=shape), wanted)
    rest = canonical(key)[tuple(slice(o, None) for o in offset)]
    assert torch.equal(reader.read(key, offset=offset), rest)


def test_a_part_reads_no_more_than_it_needs(saved_by_four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = CheckpointReader(saved_by_four, verify="never")
    files: list[str] = []
    original = reader_module.reading
    monkeypatch.setattr(reader_module, "reading", lambda path: files.append(path.name) or original(path))
    reader.read("fp32/layers.0.qkv", shape=(1, 10))
    assert len(files) == 1


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def test_a_flipped_bit_is_found_before_it_is_used(tmp_path: Path) -> None:
    path = Path(run_ranks(2, save_on_rank, tmp_path, Layout(2, 1), 5)[0])
    flip(path / "rank-00001.bin")
    with pytest.raises(DamagedError, match="step-00000005 is damaged .rank-00001.bin does not match"):
        CheckpointReader(path, verify="first")
    lazy = CheckpointReader(path)
    # Tensor-parallel rank 0 owns the first half of the embedding and all that is not split.
    half = lazy.read("fp32/embedding", shape=(25, 16))
    assert torch.equal(half, canonical("fp32/embedding")[:25])
    for _ in range(2):
        with pytest.raises(DamagedError, match="rank-00001.bin does not match"):
            lazy.read("fp32/embedding")


def test_a_file_that_shrinks_while_it_is_open(tmp_path: Path) -> None:
    path = Path(run_ranks(1, save_on_rank, tmp_path, Layout(1, 1), 5)[0])
    reader = CheckpointReader(path, verify="never")
    os.truncate(path / "rank-00000.bin", 100)
    with pytest.raises(DamagedError, match="rank-00000.bin ends at byte"):
        reader.read("fp32/layers.0.proj")


def write(parent: Path, *, step: int = 0, file_bytes: int = 1 << 40) -> Path:
    with CheckpointWriter(parent, step=step, model=MODEL, state=STATE, file_bytes=file_bytes) as writer:
        for kind in ("fp32", "exp_avg", "exp_avg_sq"):
            for name in SHAPES:
                writer.write(f"{kind}/{name}", canonical(f"{kind}/{name}"))
    return writer.path


@pytest.mark.parametrize(("file_bytes", "files"), [(1 << 40, 1), (50_000, 4)])
def test_what_the_writer_writes_loads_into_any_layout(tmp_path: Path, file_bytes: int, files: int) -> None:
    path = write(tmp_path / "new", file_bytes=file_bytes)
    assert verify_checkpoint(path) == []
    assert len(list(path.glob("rank-*.bin"))) == files
    assert load(path, Layout(1, 1)) == (0, STATE)
    assert [file.name for file in path.parent.iterdir()] == ["step-00000000"]


def test_weights_alone_in_parts(tmp_path: Path) -> None:
    whole = torch.arange(7 * 5, dtype=torch.float32).view(7, 5)
    with CheckpointWriter(tmp_path, step=3, model={}, state={}) as writer:
        for row in (4, 0, 2, 6):
            writer.write_box("fp32/w", whole[row : row + 2], offset=(row, 0), whole=(7, 5))
            writer.write_box(
                "fp32/列", whole[:, row : row + 2], offset=(0, row), whole=(7, 5)
            ) if row < 5 else None
        writer.write("fp32/scalar", torch.tensor(2.5, dtype=torch.float64))
    reader = CheckpointReader(tmp_path / "step-00000003")
    assert torch.equal(reader.read("fp32/w"), whole) and torch.equal(reader.read("fp32/列"), whole)
    assert reader.read("fp32/scalar").item() == 2.5 and reader.kinds == ["fp32"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="source is gone"),
        CheckpointWriter(tmp_path, step=1, model={}, state={}) as writer,
    ):
        writer.write("fp32/w", torch.ones(3))
        raise RuntimeError("source is gone")
    with (
        pytest.raises(AssertionError, match="fp32/w: boxes hold 2 of 4"),
        CheckpointWriter(tmp_path, step=1, model={}, state={}) as writer,
    ):
        writer.write_box("fp32/w", torch.ones(2), offset=(0,), whole=(4,))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError, match="state of a checkpoint must be plain JSON"):
        CheckpointWriter(tmp_path, step=1, model={}, state={"x": math.nan})


def test_an_older_checkpoint_of_the_step_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = write(tmp_path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(KeyError), CheckpointWriter(tmp_path, step=0, model={}, state={}) as writer:
        writer.write("fp32/w", torch.ones(3))
        raise KeyError
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    with CheckpointWriter(tmp_path, step=0, model={}, state={}) as writer:
        writer.write("fp32/w", torch.ones(3))
    assert CheckpointReader(path).keys == ["fp32/w"] and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="no room for the checkpoint .* bytes needed"),
        CheckpointWriter(tmp_path / "new", step=0, model={}, state={}, size_bytes=1 << 60),
    ):
        raise AssertionError("began to write")
    assert not (tmp_path / "new").exists()


def test_a_path_is_a_checkpoint_or_a_run(tmp_path: Path) -> None:
    write(tmp_path / "checkpoints", step=1)
    path = write(tmp_path / "checkpoints", step=2)
    lines: list[str] = []
    for place in (path, path.parent, tmp_path):
        assert locate_checkpoint(place, log=lines.append) == path
    assert lines == []
    flip(path / "rank-00000.bin")
    assert locate_checkpoint(tmp_path, log=lines.append) == path.with_name("step-00000001")
    assert len(lines) == 1 and "step-00000002 is damaged" in lines[0]
    with pytest.raises(UserError, match="no checkpoint at .*give a step"):
        locate_checkpoint(tmp_path / "nothing", log=lines.append)
