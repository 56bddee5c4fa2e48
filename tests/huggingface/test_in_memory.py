"""Generation by transformers: the model in memory is ours, to the token, in every family."""

from types import SimpleNamespace

import pytest
import torch

from megallama.checkpoint.format.model_identity import model_identity
from megallama.checkpoint.offline.reader import CheckpointReader
from megallama.checkpoint.offline.writer import CheckpointWriter
from megallama.config.load import load_config
from megallama.generate import Generator
from megallama.huggingface.checkpoint_source import model_of_checkpoint, trained_model
from megallama.huggingface.in_memory import Sampling, load_in_memory
from megallama.huggingface.names import canonical_tensors
from tests.huggingface.models import FAMILIES, SEQ_LEN
from tests.support.forward import greedy_tokens
from tests.support.jobs import SMALL
from tests.support.ranks import run_ranks

PROMPTS = [[5, 17, 99, 3, 42, 8], [1], [*range(10, 38, 2)]]
NEW = 10
END = 100


def our_tokens(folder, names):
    """Greedy tokens of each import below `folder`, trained on sequences of SEQ_LEN tokens; runs in a rank."""
    found = {}
    for name in names:
        run = folder / f"{name}-imported"
        words = [f"model={name}", *SMALL[3:], "train.run_dir=unused", f"train.seq_len={SEQ_LEN}"]
        config = load_config(words, extra_conf_dir=run / "conf")
        checkpoint = run / "checkpoints" / "step-00000000"
        found[name] = [
            tokens[: tokens.index(END)] if END in tokens else tokens
            for tokens in greedy_tokens(config, checkpoint, PROMPTS, count=NEW)
        ]
    return found


def tokens_of_transformers(run, *, seq_len):
    reader = CheckpointReader(run / "checkpoints" / "step-00000000")
    model = model_of_checkpoint(reader, trained_model(run))
    network = load_in_memory(reader, model, seq_len=seq_len, dtype=torch.float32)
    generator = Generator(model, network, SimpleNamespace(vocab_size=model.vocab_size), (END,), seq_len)
    greedy = Sampling(temperature=0)
    return [generator.continue_ids(prompt, max_new_tokens=NEW, sampling=greedy) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def ours(folder):
    (found,) = run_ranks(1, our_tokens, folder, list(FAMILIES))
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_are_those_of_our_own_forward(name, folder, ours):
    """Dynamic NTK too, whose base transformers would change as the text grows."""
    assert tokens_of_transformers(folder / f"{name}-imported", seq_len=SEQ_LEN) == ours[name]
    assert len({token for tokens in ours[name] for token in tokens}) > 1, "nothing to compare"


def test_a_shape_that_no_family_of_transformers_has(folder, tmp_path):
    """Bias and head norm together: their class with the norm has one bias more, which is zero."""
    (tmp_path / "both-imported" / "conf" / "model").mkdir(parents=True)
    text = (folder / "qwen3-imported" / "conf" / "model" / "qwen3.yaml").read_text(encoding="utf-8")
    text = text.replace("name: qwen3", "name: both") + "qkv_bias: true\n"
    (tmp_path / "both-imported" / "conf" / "model" / "both.yaml").write_text(text, encoding="utf-8")
    words = ["model=both", *SMALL[3:], "train.run_dir=unused"]
    model = load_config(words, extra_conf_dir=tmp_path / "both-imported" / "conf").model
    generator = torch.Generator().manual_seed(3)
    with CheckpointWriter(
        tmp_path / "both-imported" / "checkpoints",
        step=0,
        model=model_identity(model),
        state={},
        size_bytes=0,
    ) as writer:
        for key, made in canonical_tensors(model).items():
            tensor = torch.randn(made.shape, generator=generator) * 0.1 + ("norm" in key)
            writer.write(f"fp32/{key}", tensor)
    (ours,) = run_ranks(1, our_tokens, tmp_path, ["both"])
    assert tokens_of_transformers(tmp_path / "both-imported", seq_len=SEQ_LEN) == ours["both"]
