"""DeepSpeed under megatron-core's schedule: no backward is lost, and its buffers are where we take them to be."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from megallama.config.load import load_config
from megallama.engine import state
from megallama.engine.fragment import Fragment
from megallama.engine.state import check_fragments, counters, load_counters
from megallama.engine.step import MIN_LOSS_SCALE
from megallama.engine.zero import ZeroEngine, deepspeed_config
from megallama.host.launch import read_launch_environment
from megallama.topology.connect import connect
from tests.support.builders import build_stage, engine_of, loader_of
from tests.support.jobs import overrides
from tests.support.ranks import run_ranks


def with_engine(arguments, work):
    """`work(engine, module, loader, topology, config)` on one rank; called in every rank."""
    config = load_config(arguments)
    with connect(config.parallel, environment=read_launch_environment()) as topology:
        stage = build_stage(config, topology)
        engine = engine_of(config, topology, stage)
        loader = loader_of(config, topology)
        return work(engine, stage.module, loader, topology, config)


def without_the_remedy(arguments):
    """As DeepSpeed behaves by itself: the flag of the first backward stays set."""
    begin = ZeroEngine._begin_backward

    def count_only(self):
        optimizer = self.optimizer
        clear = optimizer.clear_backward_seen_flag
        optimizer.clear_backward_seen_flag = lambda: None
        begin(self)
        optimizer.clear_backward_seen_flag = clear

    ZeroEngine._begin_backward = count_only
    with_engine(arguments, weights_are_trained)


def weights_are_trained(engine, module, loader, topology, config):
    """Whether a step changed the weights; an error says so, too."""
    before = [parameter.clone() for parameter in module.parameters()]

    def is_changed():
        return not all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))

    try:
        engine.train_step(0, loader.batches(0))
    except AssertionError as error:
        raise AssertionError(f"{error}; weights changed: {is_changed()}") from error
    return is_changed()


PIPELINE = ["parallel.pp=2", "zero.stage=2", "train.micro_batch_size=1", "train.global_batch_size=4"]


def test_a_lost_backward_stops_the_step_before_the_update(tmp_path):
    """The first stage runs its last two backwards with no forward between. Without the remedy one of them is lost:
    when this fails because nothing is lost any more, the remedy in engine/zero.py can go.
    """
    wanted = (
        "DeepSpeed finished 3 of 4 backwards: gradients of the others would be lost; weights changed: False"
    )
    with pytest.raises(AssertionError, match=wanted):
        run_ranks(2, without_the_remedy, overrides(tmp_path, *PIPELINE))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_guard_is_silent_with_the_remedy(stage, tmp_path):
    arguments = overrides(tmp_path, *PIPELINE, f"zero.stage={stage}")
    assert run_ranks(2, with_engine, arguments, weights_are_trained) == [True] * 2


def written(engine, module, loader, topology, config):
    """Fill the state with numbers known from names and places alone, restore, and say what this rank owns."""
    engine.train_step(0, loader.batches(0))
    owned = []
    for fragment in engine.fragments():
        assert set(fragment.views) == {"fp32", "exp_avg", "exp_avg_sq"}
        assert all(view.shape == (fragment.numel,) for view in fragment.views.values())
        places = torch.arange(fragment.start, fragment.start + fragment.numel)
        fragment.views["fp32"].copy_(number_of(fragment.param_name, places))
        if fragment.is_written:
            owned.append((fragment.param_name, fragment.start, fragment.numel))
    counters = engine.counters()
    assert counters["adam_step"] == 1
    engine.restore({**counters, "adam_step": 7})
    assert engine.counters()["adam_step"] == 7
    sizes = {}
    for name, parameter in module.named_parameters():
        sizes[name] = getattr(parameter, "ds_numel", parameter.numel())
        if not hasattr(parameter, "ds_tensor"):  # under ZeRO 3 check_fragments, run by restore, has compared
            wanted = number_of(name, torch.arange(parameter.numel())).view_as(parameter)
            assert torch.equal(parameter.detach(), wanted.to(parameter.dtype)), name
    return owned, sizes


def number_of(name, places):
    return (sum(name.encode()) % 97 + places % 31).float() / 128


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fragments_of_all_ranks_are_each_parameter_once(stage, dtype, tmp_path):
    arguments = overrides(tmp_path, f"zero.stage={stage}", f"precision.dtype={dtype}")
    results = run_ranks(2, with_engine, arguments, written)
    _, sizes = results[0]
    covered = {name: [] for name in sizes}
    for owned, _ in results:
        for name, start, numel in owned:
            covered[name].append((start, numel))
    for name, ranges in covered.items():
        position = 0
        for start, numel in sorted(ranges):
            assert start == position, (name, ranges)
            position += numel
        assert position == sizes[name], (name, ranges)
    assert bool(results[1][0]) == (stage > 0), "ZeRO 0 keeps copies, and one of them is written"


def with_a_changed_master(engine, module, loader, topology, config):
    fragment = next(iter(engine.fragments()))
    fragment.views["fp32"][0] += 1
    with pytest.raises(AssertionError, match="not laid out as expected"):
        check_fragments(engine._zero, module)


def with_a_forgotten_fragment(engine, module, loader, topology, config):
    plain = state.own_fragments
    state.own_fragments = lambda zero, module: list(plain(zero, module))[1:]
    with pytest.raises(AssertionError, match=r"the fragments cover \d+ of \d+ elements"):
        check_fragments(engine._zero, module)


@pytest.mark.parametrize("work", [with_a_changed_master, with_a_forgotten_fragment])
def test_a_buffer_that_is_laid_out_otherwise_is_refused(work, tmp_path):
    run_ranks(1, with_engine, overrides(tmp_path), work)


def test_offloaded_masters_are_compared_on_the_device_of_the_weights(monkeypatch):
    """As on a GPU: weights there (here on `meta`), masters on the host."""
    seen = []
    module = torch.nn.Linear(4, 1, bias=False, device="meta", dtype=torch.bfloat16)
    fragment = Fragment("weight", 0, 4, {"fp32": torch.zeros(4)}, True)
    monkeypatch.setattr(state, "own_fragments", lambda zero, module: iter([fragment]))
    monkeypatch.setattr(torch, "equal", lambda *pair: seen.append([t.device.type for t in pair]) or True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: None)
    check_fragments(SimpleNamespace(device=torch.device("cpu"), shard_group=None), module)
    assert seen == [["meta", "meta"]]


def test_steps_are_found_where_apex_counts_them():
    """Its FusedAdam keeps one number a parameter group, and none in the state."""
    master = torch.zeros(3)
    apex = SimpleNamespace(state=defaultdict(dict), param_groups=[{}, {}], defaults={})
    zero = SimpleNamespace(optimizer=SimpleNamespace(optimizer=apex, fp32_partitioned_groups_flat=[master]))
    assert counters(zero) == {"adam_step": 0} and set(apex.state[master]) == {"exp_avg", "exp_avg_sq"}
    apex.param_groups[0]["step"] += 5
    assert counters(zero) == {"adam_step": 5}
    load_counters(zero, {"adam_step": 9})
    assert apex.param_groups == [{"step": 9}, {"step": 9}]


def overflow(engine, module, loader, topology, config):
    before = [parameter.clone() for parameter in module.parameters()]
    result = engine.train_step(0, loader.batches(0))
    kept = all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    return result, kept, engine._zero.loss_scale


def test_fp16_overflow_keeps_the_weights_and_halves_the_scale(tmp_path):
    scale = 2.0**30
    arguments = overrides(tmp_path, "precision.dtype=fp16", f"precision.initial_loss_scale={scale}")
    ((result, kept, after),) = run_ranks(1, with_engine, arguments, overflow)
    assert result.is_skipped and kept and math.isinf(result.grad_norm)
    assert (result.loss_scale, after) == (scale, scale / 2)


def with_an_infinite_weight(engine, module, loader, topology, config):
    next(module.parameters()).data.fill_(math.inf)
    return engine.train_step(0, loader.batches(0))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_gradient_that_is_no_number_is_a_fault_in_bf16(stage, tmp_path):
    arguments = overrides(tmp_path, f"zero.stage={stage}", "precision.dtype=bf16")
    (result,) = run_ranks(1, with_engine, arguments, with_an_infinite_weight)
    assert not result.is_skipped and not math.isfinite(result.grad_norm)


def test_an_overflow_at_the_smallest_loss_scale_is_a_result(tmp_path):
    """DeepSpeed would end the program in the middle of the step; the guard ends the run with a message."""
    arguments = overrides(tmp_path, "precision.dtype=fp16", "precision.initial_loss_scale=1")
    (result,) = run_ranks(1, with_engine, arguments, with_an_infinite_weight)
    assert result.is_skipped and result.loss_scale == MIN_LOSS_SCALE


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_sums_are_fp32_in_every_precision(stage, dtype, tmp_path):
    config = load_config(overrides(tmp_path, f"zero.stage={stage}", f"precision.dtype={dtype}"))
    settings = deepspeed_config(
        config.zero,
        precision=config.precision,
        clip=config.optim.clip,
        hidden_size=config.model.hidden_size,
        micro_batch_size=config.train.micro_batch_size,
        shard_size=4,
    )
    assert settings["data_types"]["grad_accum_dtype"] == settings["communication_data_type"] == "fp32"
    assert settings["zero_optimization"]["stage"] == max(1, stage)
    assert settings["gradient_accumulation_steps"] == 1 and not settings["managed_gradient_accumulation"]
    assert not settings["timers"]["throughput"]["enabled"], "it would wait for the GPU before every forward"
    assert settings["zero_optimization"]["overlap_comm"] == (stage == 3)
    assert [kind for kind in ("bf16", "fp16") if kind in settings] == ([dtype] if dtype != "fp32" else [])
