"""Weights, slices, layers, and ties."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from tests.mutations.registry import mutation, sizes, wrap, wrap_method

# Weights, slices, layers.


def initialize(change: Callable[[Any, Any], Any]) -> None:
    """Let each piece of the initial weights be another one."""
    import megallama.model.build as build

    def around(fill: Any, parameter: Any, pieces: Any, **kwargs: Any) -> Any:
        return fill(parameter, [change(piece, sizes()) for piece in pieces], **kwargs)

    wrap(build, "initialize_parameter", around)


@mutation("pp=2,zero=2,recompute=full")
def later_stages_count_layers_from_the_one_before() -> None:
    def change(piece: Any, state: Any) -> Any:
        parts = piece.key.split(".")
        if state.get_pipeline_model_parallel_rank() == 0 or "layers" not in parts:
            return piece
        place = parts.index("layers") + 1
        parts[place] = str(int(parts[place]) - 1)
        return dataclasses.replace(piece, key=".".join(parts))

    initialize(change)


@mutation("tp=2")
def qkv_is_the_slice_of_another_tp_rank() -> None:
    def change(piece: Any, state: Any) -> Any:
        if "linear_qkv" not in piece.key or piece.shape == piece.global_shape:
            return piece
        mirrored = piece.global_shape[0] - piece.shape[0] - piece.offset[0]
        return dataclasses.replace(piece, offset=(mirrored, *piece.offset[1:]))

    initialize(change)


@mutation("tp=2")
def gate_and_up_are_swapped_on_later_tp_ranks() -> None:
    def change(piece: Any, state: Any) -> Any:
        if "linear_fc1" not in piece.key or state.get_tensor_model_parallel_rank() == 0:
            return piece
        other = {"_w": "_v", "_v": "_w"}.get(piece.key[-2:], piece.key[-2:])
        return dataclasses.replace(piece, key=piece.key[:-2] + other)

    initialize(change)


@mutation("pp=2,zero=2,recompute=full")
def frequencies_differ_on_later_stages() -> None:
    import megallama.model.build as build

    def around(frequencies: Any, *args: Any, **kwargs: Any) -> Any:
        return frequencies(*args, **kwargs) * (1 + 0.01 * sizes().get_pipeline_model_parallel_rank())

    wrap(build, "inverse_frequencies", around)


@mutation("tp=2")
def vocabulary_range_is_off_by_one_on_later_tp_ranks() -> None:
    import megatron.core.tensor_parallel.cross_entropy as cross_entropy

    def shifted(range_of: Any, size: int, rank: int, world_size: int) -> Any:
        begin, end = range_of(size, rank, world_size)
        return (begin + 1, end + 1) if rank > 0 else (begin, end)

    utility: Any = cross_entropy.VocabUtility
    original = utility.vocab_range_from_per_partition_vocab_size
    cross_entropy.VocabUtility = type(
        "VocabUtility",
        (utility,),
        {"vocab_range_from_per_partition_vocab_size": staticmethod(functools.partial(shifted, original))},
    )


# Tied weights.


@mutation("pp=2,ties=true,zero=1")
def tied_copy_is_stale() -> None:
    from megallama.engine.tie import EmbeddingTie

    EmbeddingTie.publish_weight = lambda self: None


@mutation("pp=2,ties=true,zero=1")
def tied_gradients_are_not_summed() -> None:
    from megallama.engine.tie import EmbeddingTie

    def around(collect: Any, self: Any) -> None:
        if self._copy is not None:
            self._gradient.zero_()
        collect(self)

    wrap_method(EmbeddingTie, "collect_gradient", around)
