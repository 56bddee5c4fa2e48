"""The history of a run's data: which mix and which sample each step takes, past and future.

Samples are counted through the whole run, whatever batch sizes it had. A segment is a stretch of samples
under one mix; it knows how far each source was used before it, so any sample is found from its own segment
alone. A source is known by its content: it may move, leave the mix, and come back to where it stopped.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from megallama.host.errors import UserError
from megallama.stream.blend import Blend
from megallama.stream.windows import Cutting

Used = Mapping[str, tuple[int, int]]
"""Identity of a source -> (epochs completed, windows taken of the epoch under way)."""


@dataclass(frozen=True)
class MixSource:
    """One source of a mix."""

    identity: str
    """Digest of its content."""
    path: str = field(compare=False)
    """Where it was found."""
    weight: float
    """Share of the samples, relative to the other sources; above 0."""
    num_windows: int
    """Samples of one epoch."""
    span: tuple[int, int]
    """The tokens [first, second) of what lies at the path."""
    max_epochs: float | None = None
    """Epochs after which it leaves the mix; None: never."""

    @property
    def limit(self) -> float:
        """Samples after which it leaves the mix."""
        return math.inf if self.max_epochs is None else int(self.max_epochs * self.num_windows)


@dataclass(frozen=True)
class Mix:
    """What samples are drawn from."""

    cutting: Cutting
    sources: tuple[MixSource, ...]
    """Sorted by identity: the order in which a user names them means nothing."""


@dataclass(frozen=True)
class _Phase:
    """A stretch of a segment in which no source runs out."""

    first: int
    """Its first sample, counted in the segment."""
    blend: Blend | None
    """None where every source has run out."""
    active: tuple[int, ...]
    """Sources of the mix that are blended."""
    before: tuple[int, ...]
    """Samples taken of each source of the mix before this phase, in all epochs."""


@dataclass(frozen=True)
class Segment:
    """Samples from `first_sample` on under one mix."""

    first_sample: int
    mix: Mix
    used: Used
    """What was taken before, of all sources that the run ever had."""

    def draw(self, sample: int) -> tuple[MixSource, int]:
        """The source of a sample of the run, and how many samples of that source came before, in all epochs."""
        index = sample - self.first_sample
        assert 0 <= index < self.length, (sample, self.first_sample, self.length)
        phase = self._phase(index)
        assert phase.blend is not None
        turn, number = phase.blend.draw(index - phase.first)
        source = phase.active[turn]
        return self.mix.sources[source], phase.before[source] + number

    def used_before(self, sample: int) -> dict[str, tuple[int, int]]:
        """What is taken of each source before a sample of this segment, or the first one after it."""
        index = int(min(sample - self.first_sample, self.length))
        phase = self._phase(index)
        taken = list(phase.before)
        if phase.blend is not None:
            for source, count in zip(phase.active, phase.blend.counts(index - phase.first), strict=True):
                taken[source] += count
        own = {
            source.identity: divmod(count, source.num_windows)
            for source, count in zip(self.mix.sources, taken, strict=True)
        }
        return {**self.used, **own}

    @property
    def length(self) -> float:
        """Samples until every source has run out; infinite where one has no limit."""
        return self._layout[1]

    def _phase(self, index: int) -> _Phase:
        phases = self._layout[0]
        return phases[bisect.bisect_right(phases, index, key=lambda phase: phase.first) - 1]

    @cached_property
    def _layout(self) -> tuple[list[_Phase], float]:
        sources = self.mix.sources
        taken = []
        for source in sources:
            epochs, windows = self.used.get(source.identity, (0, 0))
            taken.append(epochs * source.num_windows + windows)
        phases, first = list[_Phase](), 0
        while active := [n for n, source in enumerate(sources) if taken[n] < source.limit]:
            blend = Blend([sources[n].weight for n in active])
            phases.append(_Phase(first, blend, tuple(active), tuple(taken)))
            ends = [
                blend.index_of(turn, int(sources[n].limit) - taken[n] - 1) + 1
                for turn, n in enumerate(active)
                if sources[n].limit < math.inf
            ]
            if not ends:
                return phases, math.inf
            for n, count in zip(active, blend.counts(min(ends)), strict=True):
                taken[n] += count
            first += min(ends)
        phases.append(_Phase(first, None, (), tuple(taken)))
        return phases, first


@dataclass(frozen=True)
class Pace:
    """Steps from `first_step` on take `global_batch_size` samples each, the first one from `first_sample`."""

    first_step: int
    first_sample: int
    global_batch_size: int

    def sample(self, step: int) -> int:
        """First sample of a step."""
        return self.first_sample + (step - self.first_step) * self.global_batch_size


@dataclass(frozen=True)
class History:
    """Paces and segments, each in order; never changed, only continued."""

    paces: tuple[Pace, ...] = ()
    segments: tuple[Segment, ...] = ()

    def first_sample(self, step: int) -> int:
        """First sample of a step (from 0)."""
        return self._pace(step).sample(step)

    def samples(self, step: int) -> range:
        """The samples of a step (from 0)."""
        pace = self._pace(step)
        return range(pace.sample(step), pace.sample(step + 1))

    def segment(self, sample: int) -> Segment:
        """The segment of a sample.

        Raises:
            UserError: it was taken before this history begins.
        """
        at = bisect.bisect_right(self.segments, sample, key=lambda segment: segment.first_sample) - 1
        if at < 0:
            raise UserError(
                f"sample {sample} is not in the record (the first one is {self.segments[0].first_sample}):"
                " an older megallama trained on it and kept no record"
            )
        return self.segments[at]

    def used_before(self, step: int) -> dict[str, tuple[int, int]]:
        """What steps before `step` took of each source."""
        sample = self.first_sample(step)
        if not self.segments or sample < self.segments[0].first_sample:
            return {}
        return self.segment(max(sample - 1, self.segments[0].first_sample)).used_before(sample)

    def num_steps(self) -> float:
        """Steps until the data runs out; infinite where it never does."""
        for segment, following in zip(self.segments, (*self.segments[1:], None), strict=True):
            end = segment.first_sample + segment.length
            if following is None or end < following.first_sample:
                return self._steps_before(end)
        return math.inf

    def shortage(self, steps: int) -> str | None:
        """The problem of a run of `steps` steps for which the data does not last."""
        lasts = self.num_steps()
        if lasts >= steps:
            return None
        return (
            f"the data runs out at step {lasts:.0f} of train.steps ({steps}), where every source has had its"
            " max_epochs: raise these, add sources, or lower train.steps"
        )

    def continued(self, step: int, *, global_batch_size: int, plan: Sequence[tuple[int, Mix]]) -> History:
        """This history up to `step`, and from there on as `plan` says.

        Args:
            step: The first step that is still to be taken.
            global_batch_size: Samples of each step from there on.
            plan: (step from which it holds, mix), in order; the first one holds from 0.
        """
        sample = self.first_sample(step) if self.paces else 0
        paces = tuple(pace for pace in self.paces if pace.first_step < step)
        if not paces or paces[-1].global_batch_size != global_batch_size:
            paces += (Pace(step, sample, global_batch_size),)
        result = History(paces, tuple(s for s in self.segments if s.first_sample < sample))
        now = max(number for number, (from_step, _) in enumerate(plan) if from_step <= step)
        result = result._then(sample, plan[now][1])
        for from_step, mix in plan[now + 1 :]:
            result = result._then(result.first_sample(from_step), mix)
        return result

    def _then(self, sample: int, mix: Mix) -> History:
        if not self.segments:
            return replace(self, segments=(Segment(sample, mix, {}),))
        last = self.segments[-1]
        if last.mix == mix:
            # Equal but for the paths, of which the newest are good.
            return replace(self, segments=(*self.segments[:-1], replace(last, mix=mix)))
        used = last.used_before(sample)
        if last.mix.cutting != mix.cutting:
            # Other windows: what was left of an epoch cannot be said in them, so the next epoch begins.
            used = {identity: (epoch + (place > 0), 0) for identity, (epoch, place) in used.items()}
        return replace(self, segments=(*self.segments, Segment(sample, mix, used)))

    def _pace(self, step: int) -> Pace:
        at = bisect.bisect_right(self.paces, step, key=lambda pace: pace.first_step) - 1
        if at < 0:
            raise UserError(
                f"step {step} is not in the record (the first one is {self.paces[0].first_step}):"
                " an older megallama took it and kept no record"
            )
        return self.paces[at]

    def _steps_before(self, end: float) -> float:
        if end == math.inf:
            return end
        pace = [pace for pace in self.paces if pace.first_sample <= end][-1]
        return pace.first_step + (int(end) - pace.first_sample) // pace.global_batch_size
