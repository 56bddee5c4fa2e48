"""The data of a whole life of a run: killed, resumed, its mix and batch changed, against the plain definition."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.host.errors import UserError
from megallama.stream.blend import whole_weights
from megallama.stream.history import History, Mix, MixSource, Pace
from megallama.stream.ledger import from_plain, to_plain
from megallama.stream.windows import Cutting
from tests.stream.test_blend import chairman

Drawn = tuple[str, Cutting, int, int]
"""Source, cutting, epoch, place in the epoch."""


class Plain:
    """The definition, one sample after another: sources take turns, each goes through its epochs."""

    def __init__(self) -> None:
        self.used: dict[str, tuple[int, int]] = {}
        self.mix: Mix | None = None
        self.order: list[int] = []
        self.active: list[MixSource] = []
        self.counts: dict[str, int] = {}

    def change(self, mix: Mix) -> None:
        if mix == self.mix:
            return
        if self.mix is not None and mix.cutting != self.mix.cutting:
            self.used = {s: (epoch + (place > 0), 0) for s, (epoch, place) in self.used.items()}
        self.mix = mix
        self._restart()

    def _restart(self) -> None:
        assert self.mix is not None
        self.active = [s for s in self.mix.sources if not self._is_spent(s)]
        self.order, self.counts = [], {s.identity: 0 for s in self.active}

    def _is_spent(self, source: MixSource) -> bool:
        epoch, place = self.used.get(source.identity, (0, 0))
        limit = math.inf if source.max_epochs is None else int(source.max_epochs * source.num_windows)
        return epoch * source.num_windows + place >= limit

    def draw(self) -> Drawn | None:
        """The next sample; None when every source has run out."""
        assert self.mix is not None
        if not self.active:
            return None
        weights = whole_weights([s.weight for s in self.active])
        taken = sum(self.counts.values())
        if taken >= len(self.order):
            self.order = chairman(weights, 2 * taken + 40)
        source = self.active[self.order[taken]]
        epoch, place = self.used.get(source.identity, (0, 0))
        drawn = (source.identity, self.mix.cutting, epoch, place)
        self.counts[source.identity] += 1
        for active in self.active:
            share = Fraction(str(active.weight)) / sum(Fraction(str(s.weight)) for s in self.active)
            assert abs(share * (taken + 1) - self.counts[active.identity]) < 1
        place += 1
        self.used[source.identity] = (epoch + 1, 0) if place == source.num_windows else (epoch, place)
        if self._is_spent(source):
            self._restart()
        return drawn


@dataclass
class Run:
    """One process's part of a life."""

    batch: int
    plan: list[tuple[int, Mix]]
    """Steps counted from the run's first one."""
    kept: int
    """Steps whose work reached a checkpoint."""
    lost: int
    """Steps after it, taken again by the next run."""


def mixes(draw: Any) -> Mix:
    cutting = Cutting(draw(st.sampled_from([4, 4, 4, 8])), 1)
    names = draw(st.lists(st.sampled_from("甲乙丙丁戊"), min_size=1, max_size=4, unique=True))
    sources = tuple(
        MixSource(
            name,
            draw(st.sampled_from(["here", "moved"])),
            draw(st.sampled_from([1.0, 0.5, 2.0, 7.0, 0.1])),
            span=(0, 99),
            num_windows=(3 + 5 * "甲乙丙丁戊".index(name)) * 8 // cutting.seq_len,
            max_epochs=draw(st.sampled_from([None, None, None, 0.5, 1.0, 2.5])),
        )
        for name in sorted(names)
    )
    return Mix(cutting, sources)


@st.composite
def lives(draw: Any) -> list[Run]:
    runs = []
    mix = mixes(draw)
    for _ in range(draw(st.integers(1, 4))):
        plan = [(0, mix)]
        if draw(st.booleans()):
            mix = mixes(draw)
            plan.append((draw(st.integers(1, 6)), mix))
        runs.append(
            Run(draw(st.integers(1, 7)), plan, kept=draw(st.integers(1, 12)), lost=draw(st.integers(0, 5)))
        )
        mix = draw(st.sampled_from([mix, mix, mixes(draw)]))
    return runs


def drawn_of(history: History, sample: int) -> Drawn:
    segment = history.segment(sample)
    source, number = segment.draw(sample)
    return (source.identity, segment.mix.cutting, *divmod(number, source.num_windows))


@settings(max_examples=120, deadline=None)
@given(runs=lives())
def test_a_life_is_what_the_definition_says(runs: list[Run]) -> None:
    plain, history, step = Plain(), History(), 0
    seen: dict[tuple[str, Cutting, int], list[int]] = defaultdict(list)
    for run in runs:
        # As if the plan had been written with the run's own steps in mind.
        plan = [(0, run.plan[0][1]), *((step + after, mix) for after, mix in run.plan[1:])]
        history = history.continued(step, global_batch_size=run.batch, plan=plan)
        ends = step + run.kept
        for number in range(step, ends):
            plain.change([mix for from_step, mix in plan if from_step <= number][-1])
            samples = history.samples(number)
            assert len(samples) == run.batch
            for sample in samples:
                expected = plain.draw()
                if expected is None:
                    assert history.num_steps() == number
                    return
                assert drawn_of(history, sample) == expected
                seen[expected[:3]].append(expected[3])
        for number in range(ends, min(ends + run.lost, int(min(history.num_steps(), 10**6)))):
            [drawn_of(history, sample) for sample in history.samples(number)]
        step = ends
        stored = json.loads(json.dumps(to_plain(history, step=step), ensure_ascii=False))
        history = from_plain(stored)
        consumed = {name: tuple(used) for name, used in stored["consumed"].items()}
        assert {s: u for s, u in consumed.items() if u != (0, 0)} == plain.used
    for places in seen.values():
        assert places == list(range(len(places))), "nothing is repeated or left out within an epoch"


def source(name: str, weight: float = 1.0, **options: Any) -> MixSource:
    return MixSource(name, name, weight, **{"num_windows": 10, "span": (0, 41), **options})


def begin(*sources: MixSource, batch: int = 4, seq_len: int = 4) -> History:
    mix = Mix(Cutting(seq_len, 1), sources)
    return History().continued(0, global_batch_size=batch, plan=[(0, mix)])


def test_an_unchanged_mix_is_one_segment_whatever_the_batch_size() -> None:
    history = begin(source("a"), source("b", 2.0))
    mix = history.segments[0].mix
    straight = [drawn_of(history, sample) for sample in range(60)]
    for step, batch in ((2, 6), (5, 1), (9, 1)):
        history = history.continued(step, global_batch_size=batch, plan=[(0, mix)])
    assert len(history.segments) == 1
    assert history.paces == (Pace(0, 0, 4), Pace(2, 8, 6), Pace(5, 26, 1))
    taken = [drawn_of(history, sample) for step in range(30) for sample in history.samples(step)]
    assert taken == straight[: len(taken)] and len(taken) == 51


def test_a_source_that_comes_back_goes_on_where_it_stopped() -> None:
    history = begin(source("a"), source("b"))
    without = Mix(Cutting(4, 1), (source("b"),))
    again = history.segments[0].mix
    history = history.continued(3, global_batch_size=4, plan=[(0, without)])
    history = history.continued(5, global_batch_size=4, plan=[(0, again)])
    assert history.used_before(5) == {"a": (0, 6), "b": (1, 4)}
    assert {drawn_of(history, sample) for sample in history.samples(5)} == {
        ("a", Cutting(4, 1), 0, 6),
        ("a", Cutting(4, 1), 0, 7),
        ("b", Cutting(4, 1), 1, 4),
        ("b", Cutting(4, 1), 1, 5),
    }


def test_moved_files_are_the_same_source_and_the_new_path_is_kept() -> None:
    history = begin(source("a"))
    moved = Mix(Cutting(4, 1), (replace(source("a"), path="elsewhere"),))
    history = history.continued(3, global_batch_size=4, plan=[(0, moved)])
    assert len(history.segments) == 1 and history.segments[0].mix.sources[0].path == "elsewhere"


def test_a_source_leaves_after_its_epochs_and_the_others_keep_their_proportions() -> None:
    history = begin(source("a", 1.0, max_epochs=1.0), source("b", 2.0), source("c", 1.0))
    names = [drawn_of(history, sample)[0] for sample in range(340)]
    last = max(index for index, name in enumerate(names) if name == "a")
    assert names.count("a") == 10 and 36 <= last < 40
    after = names[last + 1 :]
    assert abs(after.count("b") - 2 * len(after) / 3) < 1
    assert history.num_steps() == math.inf


def test_when_the_data_runs_out() -> None:
    history = begin(source("a", max_epochs=1.0), source("b", 3.0, max_epochs=1.25))
    assert history.num_steps() == 22 // 4
    assert begin(source("a", max_epochs=0.05)).num_steps() == 0
    planned = [(0, history.segments[0].mix), (5, Mix(Cutting(4, 1), (source("c"),)))]
    assert History().continued(0, global_batch_size=4, plan=planned).num_steps() == math.inf
    planned[1] = (6, planned[1][1])
    assert History().continued(0, global_batch_size=4, plan=planned).num_steps() == 5


def test_another_sequence_length_begins_new_epochs() -> None:
    history = begin(source("a"), batch=5)
    longer = Mix(Cutting(8, 1), (source("a", num_windows=7),))
    for steps, expected in ((3, (2, 0)), (4, (2, 0)), (0, (0, 0))):
        changed = history.continued(steps, global_batch_size=5, plan=[(0, longer)])
        assert drawn_of(changed, steps * 5)[2:] == expected, "a new epoch, unless none was under way"


def test_many_mixes_are_reached_at_once() -> None:
    plan = [(step * 10, Mix(Cutting(4, 1), (source("a"), source("b", step + 1.0)))) for step in range(200)]
    history = History().continued(0, global_batch_size=2, plan=plan)
    assert history.segment(10**15).first_sample == 199 * 20
    assert sum(epoch * 10 + place for epoch, place in history.used_before(10**15).values()) == 2 * 10**15


def stored() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(to_plain(begin(source("a")), step=7)))
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["version"], 2, "has version 2, this megallama reads 1"),
        (["consumed", "a"], [3, 8], "contradicts itself"),
        (["segments"], None, "is damaged"),
        (["segments", 0, "cutting"], {"seq_len": 4}, "is damaged"),
        (["segments", 0, "sources", 0, "num_windows"], 0, "is damaged"),
        (["paces"], [], "is damaged"),
    ],
)
def test_a_record_that_is_not_ours_is_refused(path: list[Any], value: Any, message: str) -> None:
    values = stored()
    assert from_plain(values).used_before(7) == {"a": (2, 8)}
    inner: Any = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(UserError, match=message):
        from_plain(values)


def test_a_run_of_an_older_megallama_begins_new_epochs_and_says_what_is_not_known() -> None:
    history = History(paces=(Pace(50, 200, 4),))
    history = history.continued(50, global_batch_size=4, plan=[(0, begin(source("a")).segments[0].mix)])
    assert history.samples(50) == range(200, 204) and drawn_of(history, 200)[2:] == (0, 0)
    with pytest.raises(UserError, match="step 49 is not in the record"):
        history.samples(49)
    with pytest.raises(UserError, match="sample 199 is not in the record"):
        history.segment(199)
