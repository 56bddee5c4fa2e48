"""How layouts are written, which are legal, and that a shrunk model keeps its structure."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megallama.config.load import load_config
from megallama.host.errors import ConfigError, UserError
from megallama.verification.layouts import change, legal_layouts, parse_layouts, problems_of
from megallama.verification.shrink import shrink
from megallama.verification.verify import check_layouts, default_layouts, verify
from tests.layouts.matrix import base, covering_set, full_matrix, pairs_of, part_of_matrix


def test_layouts_are_written_with_short_names_and_dotted_keys():
    first, second = parse_layouts("tp=2,sp=true,zero=2 ; dp=4,train.recompute=full")
    cut = first.apply(base())
    assert (cut.parallel.tp, cut.parallel.sequence_parallel, cut.zero.stage, first.dp) == (2, True, 2, 1)
    cut = second.apply(base())
    assert (second.dp, cut.train.recompute.value, second.world_size(cut)) == (4, "full", 4)


def test_lists_hold_commas():
    (layout,) = parse_layouts("pp=2,layers_per_stage=[7,9]")
    assert layout.apply(base()).parallel.layers_per_stage == [7, 9]


def test_a_layout_starts_from_no_parallelism_at_all():
    config = load_config(["+exp=llama3_405b"])
    (layout,) = parse_layouts("dp=2")
    cut = layout.apply(config)
    assert (cut.parallel.tp, cut.parallel.pp, cut.parallel.sequence_parallel) == (1, 1, False)
    assert layout.world_size(cut) == 2


@pytest.mark.parametrize("text", ["", ";", "tp", "tp=", "dp=0", "dp=two"])
def test_what_is_no_layout_is_refused(text):
    with pytest.raises(UserError):
        parse_layouts(text)


@pytest.mark.parametrize("text", ["tq=2", "tp=two", "model.nothing=1", "zero=1,nowhere.at=2"])
def test_unknown_settings_are_refused(text):
    with pytest.raises(ConfigError):
        parse_layouts(text)[0].apply(base())


def test_illegal_layouts_are_refused_together_before_anything_runs():
    with pytest.raises(ConfigError) as refusal:
        check_layouts(base(), parse_layouts("tp=3;pp=2,zero=9;tp=2"))
    text = str(refusal.value)
    assert "layout tp=3: model.num_heads" in text and "layout pp=2,zero=9: zero.stage" in text
    assert "layout tp=2:" not in text


def test_the_matrix_has_at_least_80_legal_layouts_and_every_axis():
    layouts = full_matrix()
    assert len(layouts) >= 80 and len({layout.name for layout in layouts}) == len(layouts)
    cuts = [layout.apply(base()) for layout in layouts]
    assert {layout.world_size(cut) for layout, cut in zip(layouts, cuts, strict=True)} == {1, 2, 4, 8}
    for axis in ("tp", "pp", "vp", "sequence_parallel"):
        assert len({getattr(cut.parallel, axis) for cut in cuts}) > 1, axis
    assert {cut.zero.stage for cut in cuts} == {0, 1, 2, 3}
    assert {cut.train.recompute.value for cut in cuts} == {"none", "full", "selective"}
    assert {cut.model.tie_embeddings for cut in cuts} == {False, True}


def test_no_legal_layout_is_one_that_the_check_refuses():
    config = change(base(), {"model.num_heads": 2, "model.num_kv_heads": 1})
    assert max(layout.apply(config).parallel.tp for layout in legal_layouts(config, max_ranks=4)) == 2


def test_a_covering_set_has_every_pair_of_the_matrix():
    layouts = full_matrix(max_ranks=4)
    chosen = covering_set(layouts)
    assert len(chosen) < len(layouts)
    assert set().union(*map(pairs_of, chosen)) == set().union(*map(pairs_of, layouts))


def test_a_part_of_the_matrix_has_every_pair_and_as_many_layouts_as_asked():
    layouts = full_matrix(max_ranks=4)
    part = part_of_matrix(layouts, at_least=90)
    assert len(part) == len({layout.name for layout in part}) == 90
    assert set().union(*map(pairs_of, part)) == set().union(*map(pairs_of, layouts))
    assert len(part_of_matrix(layouts, at_least=10**6)) == len(layouts)


EXPERIMENTS = sorted(
    path.stem for path in (Path(__file__).parents[2] / "conf" / "exp").glob("*.yaml") if path.stem != "demo"
)


def shrunk(config, layouts):
    """The small run, which every layout must be able to cut."""
    small = change(shrink(config, layouts, steps=5), {"data.sources": ["tokens"]})
    for layout in layouts:
        cut = layout.apply(small)
        assert problems_of(cut, world_size=layout.world_size(cut)) == [], layout.name
    return small


def test_what_a_cluster_has_is_left_out_of_the_small_run():
    config = load_config(
        [
            *(
                "+exp=llama2_7b",
                "train.init_from=weights",
                "optim.partial_steps=500",
                "optim.partial_rows_from=31000",
            ),
            *("kernels.attention=te", "kernels.norm=apex", "kernels.adam=reference"),
            "data.schedule=[{from_step: 9, sources: [more]}]",
        ]
    )
    small = shrunk(config, parse_layouts("dp=2;tp=2"))
    assert small.train.init_from is None and small.data.schedule == []
    assert (small.kernels.attention.value, small.kernels.norm.value) == ("auto", "auto")
    assert small.kernels.adam == config.kernels.adam
    assert small.optim.partial_steps == 2 and small.optim.partial_rows_from == small.model.vocab_size // 2


@pytest.mark.parametrize("exp", EXPERIMENTS)
def test_shrinking_keeps_the_structure(exp):
    config = load_config([f"+exp={exp}"])
    layouts = default_layouts(config) + parse_layouts("tp=4,sp=true,dp=2;pp=4,vp=2")
    small = shrunk(config, layouts)
    big, model = config.model, small.model
    ratio = big.num_heads // big.kv_heads
    assert model.num_heads // model.kv_heads == ratio
    assert (model.num_kv_heads is None) == (big.num_kv_heads is None)
    assert model.tie_embeddings == big.tie_embeddings and model.rope_scaling == big.rope_scaling
    assert (model.vocab_size % model.vocab_multiple == 0) == (big.vocab_size % big.vocab_multiple == 0)
    assert small.train.recompute == config.train.recompute and small.optim.clip == config.optim.clip
    assert model.hidden_size <= 64 and model.num_layers <= 9


@pytest.mark.parametrize("exp", EXPERIMENTS)
@pytest.mark.parametrize(
    "text", ["cp=2,cp_kind=ulysses,pp=2", "tp=2,sp=true,cp=4,cp_kind=ulysses", "cp=8,cp_kind=ulysses;tp=4"]
)
def test_shrinking_leaves_ulysses_heads_to_exchange(exp, text):
    config = load_config([f"+exp={exp}"])
    layouts = parse_layouts(text)
    check_layouts(config, layouts)
    small = shrunk(config, layouts)
    parallel = layouts[0].apply(small).parallel
    ranks = parallel.tp * parallel.cp
    few, many = small.model, config.model
    assert few.num_heads % ranks == 0
    assert (few.kv_heads % ranks == 0) == (many.kv_heads % ranks == 0)


@pytest.mark.parametrize("text", ["dp=2,gbs=5", "cp=2,train.seq_len=64"])
def test_a_setting_that_the_small_run_cannot_have_is_refused_before_anything_runs(text):
    config = load_config(["+exp=llama2_7b"])
    with pytest.raises(ConfigError, match="made small"):
        next(verify(config, parse_layouts(text)))


def test_shrinking_keeps_the_padding_of_the_vocabulary():
    model = shrink(base(), parse_layouts("tp=2"), steps=2).model
    assert base().model.vocab_size % base().model.vocab_multiple and model.vocab_size % model.vocab_multiple


def test_shrinking_keeps_an_uneven_split():
    (layout,) = parse_layouts("pp=2,layers_per_stage=[3,2]")
    small = shrink(base(), [layout], steps=2)
    assert small.model.num_layers == 5


def test_the_default_layouts_follow_the_experiment():
    config = load_config(["+exp=llama3_405b"])
    cuts = [layout.apply(config).parallel for layout in default_layouts(config)]
    assert any(cut.tp == 2 and cut.pp == 2 and cut.sequence_parallel for cut in cuts)
    alone = dataclasses.replace(
        config, parallel=dataclasses.replace(config.parallel, tp=1, pp=1, sequence_parallel=False)
    )
    assert [layout.dp for layout in default_layouts(alone)] == [2]
