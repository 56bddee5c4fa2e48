"""One process computes what LLaMA is: its loss and gradients are those of tests/layouts/plain_llama.py.

All other proofs compare with one process; what is wrong there too would pass them.
"""

from functools import partial

import pytest
import torch

from megallama.engine.build import build_run_engine
from megallama.host.launch import read_launch_environment
from megallama.topology.connect import connect
from megallama.verification.job import _canonical, _first_gradients, _whole
from megallama.verification.layouts import change, parse_layouts
from megallama.verification.shrink import shrink
from megallama.verification.synthetic import with_uneven_mask, write_tokens
from tests.layouts.matrix import base
from tests.layouts.plain_llama import loss_sum
from tests.support.builders import loader_of
from tests.support.ranks import run_ranks

ANGLES = 2e-6
"""Relative; rotary angles are fp32 in the model and fp64 in the oracle, all else is fp64 in both."""

MODELS = {
    "grouped queries, padded vocabulary": {},
    "as many key heads as query heads": {"model.num_kv_heads": None},
    "one key head, positions of documents": {"model.num_kv_heads": 1, "data.reset_positions": True},
    "tied": {"model.tie_embeddings": True},
    "llama3 scaling": {
        "model.rope_scaling": "llama3",
        "model.rope_scaling_factor": 8.0,
        "model.rope_original_max_seq_len": 16,
        "model.rope_theta": 500.0,
    },
    "linear scaling, other widths": {
        "model.rope_scaling": "linear",
        "model.rope_scaling_factor": 4.0,
        "model.head_dim": 12,
        "model.norm_eps": 1e-3,
        "model.vocab_size": 128,
    },
}


def small_run(settings, folder):
    small = change(shrink(base(), parse_layouts("dp=1"), steps=1), settings)
    write_tokens(folder / "tokens", num_tokens=4_000, vocab_size=small.model.vocab_size, seq_len=32, seed=3)
    places = {
        "data.sources": [str(folder / "tokens")],
        "train.run_dir": str(folder),
        "precision.dtype": "fp64",
    }
    return change(small, {**places, "train.micro_batch_size": 2, "train.global_batch_size": 4})


def one_step(config):
    """(weights before, batches, result, gradients) of the first step; called in the one rank."""
    with connect(config.parallel, environment=read_launch_environment()) as topology:
        engine = build_run_engine(config, topology)
        batches = with_uneven_mask(loader_of(config, topology).batches(0))
        weights = {key: _whole(tensor) for key, tensor in _canonical(engine, "fp32")}
        result = engine.train_step(0, batches)
        found = _first_gradients(engine, config.optim, result.grad_norm)
        return weights, batches, result, {key: _whole(tensor) for key, tensor in found.items()}


def plain_step(config, weights, batches):
    """(mean loss, gradients) by the oracle."""
    weights = {key: weight.clone().requires_grad_() for key, weight in weights.items()}
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        for row, tokens in enumerate(batch.tokens_BS):
            total = total + loss_sum(
                weights,
                config.model,
                tokens=tokens,
                labels=batch.labels_BS[row],
                mask=batch.loss_mask_BS[row].double(),
                positions=batch.positions_BS.expand(batch.tokens_BS.size(0), -1)[row],
                documents=batch.document_starts[row],
            )
    loss = total / sum(batch.loss_mask_BS.sum() for batch in batches)
    loss.backward()
    return float(loss.detach()), {key: weight.grad for key, weight in weights.items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_one_process_is_a_plain_llama(name, kernels, tmp_path):
    config = small_run({**MODELS[name], "kernels.attention": kernels, "kernels.norm": kernels}, tmp_path)
    ((weights, batches, result, gradients),) = run_ranks(1, partial(one_step, config))
    assert any(len(starts) > 1 for batch in batches for starts in batch.document_starts)
    loss, wanted = plain_step(config, weights, batches)
    assert set(gradients) == set(wanted)
    assert result.loss == pytest.approx(loss, rel=ANGLES)
    assert result.grad_norm == pytest.approx(
        float(torch.stack([g.norm() for g in wanted.values()]).norm()), rel=ANGLES
    )
    for key, gradient in wanted.items():
        error = float((gradients[key].view_as(gradient) - gradient).abs().max() / gradient.abs().max())
        assert error < ANGLES, key
