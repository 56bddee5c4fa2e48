"""Settings of the pipeline and of recomputation reach megatron-core."""

import pytest

from megallama.config.load import load_config
from megallama.model.build import transformer_config
from tests.support.jobs import SMALL

PP3 = ["parallel.pp=3", "model.num_layers=7"]


def transformer(*extra):
    config = load_config([*SMALL, "train.run_dir=unused", *extra])
    return transformer_config(
        config.model, parallel=config.parallel, precision=config.precision, train=config.train
    )


@pytest.mark.parametrize(
    ("extra", "layers"),
    [
        (PP3, [[2], [3], [2]]),
        ([*PP3, "parallel.layers_per_stage=[1,2,4]"], [[1], [2], [4]]),
        (["parallel.pp=2", "parallel.vp=2", "parallel.layers_per_stage=[1,1,1,1]"], [[1, 1], [1, 1]]),
        (
            ["parallel.pp=2", "parallel.vp=2", "model.num_layers=8", "parallel.layers_per_stage=[1,2,3,2]"],
            [[1, 3], [2, 2]],
        ),
    ],
)
def test_layers_are_where_the_settings_say(extra, layers):
    layout = transformer(*extra).pipeline_model_parallel_layout.layout
    assert [[[kind.name for kind in chunk].count("decoder") for chunk in rank] for rank in layout] == layers


def test_recomputation():
    some = transformer("train.recompute=full", "train.recompute_layers=2")
    assert (some.recompute_method, some.recompute_num_layers) == ("block", 2)
    every = transformer("train.recompute=full")
    assert (every.recompute_method, every.recompute_num_layers) == ("uniform", 1)
    assert transformer().recompute_granularity is None


def test_interleaved_pipelines_do_not_batch_their_messages():
    plain, interleaved = transformer("parallel.pp=2"), transformer("parallel.pp=2", "parallel.vp=2")
    assert (plain.overlap_p2p_comm, plain.batch_p2p_comm) == (False, True)
    assert (interleaved.overlap_p2p_comm, interleaved.batch_p2p_comm) == (True, False)
