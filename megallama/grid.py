"""Arithmetic of the rank grid: coordinates, groups, division of layers and micro-batches.

Plain integers, no imports: a layout can be planned and checked without a process. Ranks are laid out
as megatron-core's default order "tp-cp-ep-dp-pp": tp varies fastest, pp slowest; `topology` asserts
at start that megatron-core's groups equal the ones computed here.
"""

from __future__ import annotations

from dataclasses import dataclass

AXES = ("tp", "cp", "dp", "pp")
"""The axes of the grid, fastest varying first."""


@dataclass(frozen=True)
class Coordinates:
    """Place of one rank on every axis."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class Grid:
    """Sizes of the axes of one job."""

    tp: int
    cp: int
    dp: int
    pp: int

    @classmethod
    def from_world_size(cls, world_size: int, *, tp: int, cp: int, pp: int) -> Grid:
        """The grid of `world_size` ranks; dp is what remains.

        Raises:
            ValueError: world_size is not a multiple of tp x cp x pp.
        """
        model_size = tp * cp * pp
        if world_size % model_size:
            raise ValueError(
                f"world_size ({world_size}) must be a multiple of tp x pp x cp ({tp} x {pp} x {cp} = {model_size}):"
                f" start {nearest_multiples(world_size, model_size)} ranks or change parallel.tp, parallel.pp"
            )
        return cls(tp=tp, cp=cp, dp=world_size // model_size, pp=pp)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.cp * self.dp * self.pp

    def coordinates(self, rank: int) -> Coordinates:
        """Place of `rank` (0 <= rank < world_size)."""
        assert 0 <= rank < self.world_size, (rank, self)
        place = {}
        for axis in AXES:
            rank, place[axis] = divmod(rank, getattr(self, axis))
        return Coordinates(**place)

    def groups(self, *axes: str) -> list[list[int]]:
        """Ranks that differ only along `axes`, one list a group, ascending; `groups("dp", "cp")` is the joint axis."""
        by_rest: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            place = self.coordinates(rank)
            rest = tuple(getattr(place, axis) for axis in AXES if axis not in axes)
            by_rest.setdefault(rest, []).append(rank)
        return sorted(by_rest.values())

    def group_of(self, rank: int, *axes: str) -> list[int]:
        """The group of `groups(*axes)` that holds `rank`."""
        return next(group for group in self.groups(*axes) if rank in group)


def split_layers(num_layers: int, num_stages: int) -> list[int]:
    """Layers of each virtual stage in model order, as even as can be.

    Where they do not divide, stages at the ends hold one fewer, the last first: the last one also computes the
    loss and the first one embeds. 126 layers over 16 stages are 7, 14 x 8, 7, as in LLaMA 3 (arXiv:2407.21783).
    """
    assert 0 < num_stages <= num_layers, (num_layers, num_stages)
    most = -(-num_layers // num_stages)
    layers = [most] * num_stages
    for spared in range(most * num_stages - num_layers):
        layers[spared // 2 if spared % 2 else -1 - spared // 2] -= 1
    return layers


def micro_batch_group_size(num_micro_batches: int, *, pp: int) -> int:
    """Micro-batches that a rank of an interleaved pipeline sends through one chunk before it turns to the next.

    As few as keep the pipeline without gaps: at least pp, and a last, smaller group of none or at least pp.

    Raises:
        ValueError: fewer micro-batches than stages.
    """
    if num_micro_batches < pp:
        raise ValueError(
            f"the interleaved pipeline needs at least as many micro-batches ({num_micro_batches}) as parallel.pp"
            f" ({pp}): raise train.global_batch_size, lower train.micro_batch_size, or use parallel.vp=1"
        )
    groups = range(pp, num_micro_batches + 1)
    return next(g for g in groups if num_micro_batches % g == 0 or num_micro_batches % g >= pp)


def num_micro_batches(global_batch_size: int, *, micro_batch_size: int, dp: int) -> int:
    """Micro-batches of one step on each data-parallel rank.

    Raises:
        ValueError: global_batch_size is not a multiple of micro_batch_size x dp.
    """
    per_pass = micro_batch_size * dp
    if global_batch_size % per_pass:
        raise ValueError(
            f"train.global_batch_size ({global_batch_size}) must be a multiple of micro_batch_size x dp_size"
            f" ({micro_batch_size} x {dp} = {per_pass}): use {nearest_multiples(global_batch_size, per_pass)}"
        )
    return global_batch_size // per_pass


def padded_vocab_size(vocab_size: int, *, multiple: int) -> int:
    """Rows of the embedding: vocab_size rounded up to `multiple`. Independent of tp, so part of the canonical shape."""
    return -(-vocab_size // multiple) * multiple


def nearest_multiples(value: int, base: int) -> str:
    """The multiples of `base` next to `value`, as words for an error message: "96 or 128"."""
    below = value // base * base
    return f"{below} or {below + base}" if below else f"{base}"
