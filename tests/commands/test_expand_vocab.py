"""Growing the vocabulary of a checkpoint: old logits bit-equal, new rows as promised, training goes on from it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from megallama.checkpoint.format.model_identity import model_of_identity
from megallama.checkpoint.offline.reader import CheckpointReader
from megallama.cli import main
from megallama.config.load import load_config
from megallama.expand_vocab import expand_vocab
from megallama.host.errors import UserError
from megallama.host.launch import read_launch_environment
from megallama.model.build import EMBEDDING, OUTPUT
from megallama.prepare.run import prepare
from megallama.tokenizers.load import SentencePieceTokenizer, load_tokenizer
from megallama.tokenizers.merge import merge_tokenizers
from megallama.tokenizers.training import train_tokenizer
from megallama.topology.connect import connect
from tests.support.builders import build_stage
from tests.support.corpus import write_corpus
from tests.support.jobs import metrics, overrides, run_job, train, worst_relative
from tests.support.materials import QWEN, chinese_chapters
from tests.support.ranks import run_ranks

OLD = 381
"""Ids of the old tokenizer: a number that pads to 384 rows."""


@dataclasses.dataclass(frozen=True)
class Ground:
    """Tokenizers, data and a trained run for the tests of this file."""

    folder: Path
    old: Path
    new: Path
    new_size: int

    def words(self, run: str, *, vocab_size: int) -> list[str]:
        data = self.folder / ("new_data" if vocab_size == self.new_size else "old_data") / "train"
        tokenizer = self.new if vocab_size == self.new_size else self.old
        return [
            f"data.sources=[{{path: {data}}}]",
            f"data.tokenizer={tokenizer}",
            f"model.vocab_size={vocab_size}",
        ]

    def tensors(self, run: str) -> dict[str, torch.Tensor]:
        (path,) = (self.folder / run / "checkpoints").iterdir()
        return dict(CheckpointReader(path).read_all())


def with_space_before(path: Path) -> Path:
    """Let the model put a space before every text, as LLaMA's does."""
    proto = SentencePieceTokenizer(path).proto
    proto.normalizer_spec.add_dummy_prefix = True
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expand")
    corpus = write_corpus(folder / "corpus", files=20)
    book = folder / "三国.txt"
    book.write_text("\n".join(chinese_chapters()[:8]), encoding="utf-8")
    old = with_space_before(train_tokenizer([corpus], folder / "old", vocab_size=OLD))
    second = train_tokenizer([book], folder / "second", vocab_size=2900)
    merged = merge_tokenizers(old, second, folder / "new", max_pieces=700)
    for name, tokenizer in (("old_data", old), ("new_data", merged.path)):
        prepare([corpus, book], folder / name, tokenizer=tokenizer, validation_fraction=0)
    made = Ground(folder, old, merged.path, merged.new_size)
    for run, extra in (("untied", ["parallel.tp=2"]), ("tied", ["model.tie_embeddings=true"])):
        words = [*made.words(run, vocab_size=OLD), *extra, "train.steps=6", "optim.lr=1e-2"]
        run_job(folder, 2, *words, run_name=run)
        code = main(
            [
                "expand-vocab",
                str(folder / run),
                "--output",
                str(folder / f"{run}-grown"),
                "--tokenizer",
                str(made.new),
            ]
        )
        assert code == 0
    return made


def logits_of(arguments: tuple[Path, int, int, bool]) -> torch.Tensor:
    """This rank's logits over fixed old tokens; runs in a rank."""
    path, vocab_size, tp, is_tied = arguments
    words = [
        "model=llama_tiny",
        "model.num_layers=4",
        f"model.vocab_size={vocab_size}",
        "train.run_dir=unused",
    ]
    words += [f"model.tie_embeddings={is_tied}", f"parallel.tp={tp}", "precision.dtype=fp32", "train.steps=1"]
    words += ["train.seq_len=32", "train.global_batch_size=2", "optim.lr=1", "data.sources=[]"]
    config = load_config(words)
    with connect(config.parallel, environment=read_launch_environment()) as topology, torch.no_grad():
        stage = build_stage(config, topology, is_initialized=False)
        reader = CheckpointReader(path)
        for name, parameter in stage.module.named_parameters():
            for piece in stage.layout[name]:
                part = reader.read(f"fp32/{piece.key}", offset=piece.offset, shape=piece.shape)
                parameter.view(-1)[piece.start : piece.start + math.prod(piece.shape)].copy_(part.reshape(-1))
        tokens = torch.randint(0, OLD, (2, 32), generator=torch.Generator().manual_seed(5))
        return stage.chunks[0](tokens, None, None)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("run", ["untied", "tied"])
def test_logits_of_old_tokens_are_bit_equal(ground, run, tp):
    found = []
    for name, vocab_size in ((run, OLD), (f"{run}-grown", ground.new_size)):
        (path,) = (ground.folder / name / "checkpoints").iterdir()
        parts = run_ranks(tp, logits_of, (path, vocab_size, tp, run == "tied"))
        found.append(torch.cat(parts, dim=-1)[..., :OLD])
    before, after = found
    assert before.shape[-1] == OLD and before.std() > 0.1
    assert torch.equal(before, after), (before - after).abs().max()


@pytest.mark.parametrize("run", ["untied", "tied"])
def test_old_rows_are_copied_and_new_ones_are_means(ground, run):
    before, after = ground.tensors(run), ground.tensors(f"{run}-grown")
    assert before.keys() == after.keys() and (OUTPUT in after) == (run == "untied")
    old, new = load_tokenizer(ground.old), load_tokenizer(ground.new)
    for name, tensor in before.items():
        if name not in (EMBEDDING, OUTPUT):
            assert torch.equal(after[name], tensor), name
            continue
        grown = after[name]
        assert len(tensor) == 384 and len(grown) == -(-ground.new_size // 128) * 128
        assert torch.equal(grown[:OLD], tensor[:OLD])
        for token in range(OLD, ground.new_size):
            pieces = old.split(new.surface(token))
            assert len(pieces) > 1 and b"".join(map(old.surface, pieces)) == new.surface(token)
            torch.testing.assert_close(grown[token], tensor[pieces].mean(0), rtol=0, atol=1e-6)
        padding = tensor[OLD:].mean(0).expand(len(grown) - ground.new_size, -1)
        torch.testing.assert_close(grown[ground.new_size :], padding, rtol=0, atol=1e-6)


def test_the_mean_is_of_the_text_inside_a_sentence(ground):
    # With the space that LLaMA's tokenizer puts before a text, each Chinese word would get a space's row mixed in.
    from tests.support.materials import MISTRAL

    llama = load_tokenizer(MISTRAL)
    assert llama.label(llama.encode("曹操")[0]) == "▁"
    assert b"".join(llama.surface(i) for i in llama.split("曹操".encode())) == "曹操".encode()
    assert b"".join(llama.surface(i) for i in llama.split(b" x")) == b" x"


@pytest.mark.parametrize("init", ["zeros", "normal"])
def test_other_first_values(ground, init, tmp_path):
    arguments = [
        str(ground.folder / "untied"),
        "--output",
        str(tmp_path / "out"),
        "--tokenizer",
        str(ground.new),
    ]
    assert main(["expand-vocab", *arguments, "--init", init, "--old-tokenizer", str(ground.old)]) == 0
    (path,) = (tmp_path / "out" / "checkpoints").iterdir()
    rows = CheckpointReader(path).read(f"fp32/{EMBEDDING}")[OLD : ground.new_size]
    old = ground.tensors("untied")[EMBEDDING][:OLD]
    if init == "zeros":
        assert not rows.any()
    else:
        assert 0.9 < float(rows.std() / old.std()) < 1.1 and len(rows.unique(dim=0)) == len(rows)


def test_large_tables_are_worked_on_by_columns(ground, tmp_path, monkeypatch):
    monkeypatch.setattr("megallama.expand_vocab._BLOCK_ELEMENTS", 1200 * 13)
    report = expand_vocab(ground.folder / "untied", tmp_path / "out", tokenizer=ground.new)
    wanted = ground.tensors("untied-grown")
    for name, tensor in CheckpointReader(report.checkpoint, verify="first").read_all():
        assert torch.equal(tensor, wanted[name]), name


def test_the_checkpoint_says_what_it_is(ground):
    (path,) = (ground.folder / "untied-grown" / "checkpoints").iterdir()
    reader = CheckpointReader(path, verify="first")
    assert (reader.step, reader.kinds) == (0, ["fp32"])
    assert reader.state == {
        "expanded": {"old_vocab_size": OLD, "step": 6, "init": "mean"},
        "source": {"dtype": "float32"},
    }
    assert model_of_identity(reader.model, name="x", max_seq_len=32).vocab_size == ground.new_size


@pytest.mark.parametrize("run", ["untied", "tied"])
def test_a_grown_vocabulary_can_be_looked_at_before_training(ground, run, tmp_path, capsys):
    """Old tokens are what they were: with only those to choose from, the same text comes out."""
    from megallama.generate import Sampling, open_generator

    texts = []
    for name in (run, f"{run}-grown"):
        generator = open_generator(ground.folder / name)
        old = dataclasses.replace(generator, tokenizer=load_tokenizer(ground.old))
        texts.append(old.continue_ids([5, 300], max_new_tokens=8, sampling=Sampling(temperature=0)))
    assert texts[0] == texts[1]
    grown = ground.folder / f"{run}-grown"
    assert main(["generate", str(grown), "--prompt", "却说曹操", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("却说曹操")
    assert main(["export", str(grown), "--output", str(tmp_path / "hf")]) == 0
    assert main(["import", str(tmp_path / "hf"), "--output", str(tmp_path / "imported")]) == 0
    back = dict(CheckpointReader(tmp_path / "imported" / "checkpoints" / "step-00000000").read_all())
    for name, tensor in ground.tensors(f"{run}-grown").items():
        rows = ground.new_size if name in (EMBEDDING, OUTPUT) else len(tensor)
        assert torch.equal(back[name][:rows], tensor[:rows]), name
    # A vocabulary that is grown again, after an import whose config.json is kept.
    kept = tmp_path / "imported" / "huggingface" / "config.json"
    assert main([*_grow(tmp_path / "imported", tmp_path / "more"), str(_one_more(ground, tmp_path))]) == 0
    config = json.loads((tmp_path / "more" / "huggingface" / "config.json").read_text(encoding="utf-8"))
    assert config == {**json.loads(kept.read_text(encoding="utf-8")), "vocab_size": ground.new_size + 1}
    assert main(["export", str(tmp_path / "more"), "--output", str(tmp_path / "hf-more")]) == 0


def _grow(source, output):
    return ["expand-vocab", str(source), "--output", str(output), "--tokenizer"]


def _one_more(ground, folder):
    proto = SentencePieceTokenizer(ground.new).proto
    proto.pieces.add(piece="曹操大笑曰", score=min(piece.score for piece in proto.pieces) - 1, type=1)
    (folder / "one-more.model").write_bytes(proto.SerializeToString())
    return folder / "one-more.model"


def continued(ground, name, world_size, *extra):
    words = [
        *ground.words(name, vocab_size=ground.new_size),
        f"train.init_from={ground.folder / 'untied-grown'}",
    ]
    run_ranks(world_size, train, overrides(ground.folder, *words, *extra, run_name=name))
    return [(line["train/loss"], line["train/grad_norm"]) for line in metrics(ground.folder / name)]


def test_training_goes_on_in_any_layout_first_new_rows_then_all(ground):
    partial = [
        "optim.partial_steps=3",
        f"optim.partial_rows_from={OLD}",
        "checkpoint.interval=3",
        "checkpoint.keep=0",
    ]
    wanted = continued(ground, "one", 1, *partial)
    start = ground.tensors("untied-grown")
    for name, world_size, extra in (
        ("tp2", 2, ["parallel.tp=2", "zero.stage=1"]),
        ("dp2", 2, ["zero.stage=2"]),
        ("sharded", 2, ["zero.stage=3"]),
    ):
        loss, norm = worst_relative(continued(ground, name, world_size, *partial, *extra), wanted)
        # The weights come from steps at a high learning rate, where rounding in the gradient weighs more.
        assert loss < 1e-6 and norm < 5e-6, (name, loss, norm)
        third = dict(CheckpointReader(ground.folder / name / "checkpoints" / "step-00000003").read_all())
        for key, tensor in start.items():
            end = OLD if key in (EMBEDDING, OUTPUT) else len(tensor)
            assert torch.equal(third[key][:end], tensor[:end]), (name, key)
            assert end == len(tensor) or not torch.equal(third[key][end:], tensor[end:])
        last = dict(CheckpointReader(ground.folder / name / "checkpoints" / "step-00000005").read_all())
        assert not torch.equal(last[EMBEDDING][:OLD], start[EMBEDDING][:OLD])
    losses = [loss for loss, _ in wanted]
    assert losses[-1] < losses[0]


def test_means_start_better_than_random_rows(ground):
    grown = continued(ground, "grown", 1, "train.steps=1", "optim.lr=1e-30")
    words = ground.words("random", vocab_size=ground.new_size)
    random = run_job(ground.folder, 1, *words, "train.steps=1", "optim.lr=1e-30", run_name="random")
    assert grown[0][0] < random[0][0]


def test_what_cannot_be_expanded_is_refused(ground, tmp_path, capsys):
    run, out = str(ground.folder / "untied"), str(tmp_path / "out")
    other = train_tokenizer([ground.folder / "三国.txt"], tmp_path / "other", vocab_size=2900)
    for arguments, message in [
        ([run, "--output", out, "--tokenizer", str(ground.old)], "adds nothing"),
        ([run, "--output", out, "--tokenizer", str(other)], "must keep every old id"),
        (
            [run, "--output", out, "--tokenizer", str(ground.new), "--old-tokenizer", str(other)],
            "has more ids (2900)",
        ),
        ([run, "--output", out, "--tokenizer", str(QWEN)], "must keep every old id"),
        ([str(tmp_path), "--output", out, "--tokenizer", str(ground.new)], "no checkpoint"),
        (
            [run, "--output", str(ground.folder / "untied-grown"), "--tokenizer", str(ground.new)],
            "holds checkpoints already",
        ),
    ]:
        assert main(["expand-vocab", *arguments]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="init"):
        expand_vocab(run, out, tokenizer=ground.new, init="mode")  # type: ignore[arg-type]


def test_a_wrong_vocabulary_size_is_told_before_the_run_starts(ground, capsys):
    words = [*ground.words("x", vocab_size=OLD), f"train.init_from={ground.folder / 'untied-grown'}"]
    words = overrides(ground.folder, *words, run_name="never")
    assert main(["check", *words]) == 2
    assert f"vocab_size: {ground.new_size} there, {OLD} here" in capsys.readouterr().err
