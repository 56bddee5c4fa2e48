"""The likely cause of a difference, judged by its pattern over tensors, ranks and steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from megallama.config.schema import RunConfig
from megallama.verification.compare import GRAD_NORM, LOSS, Comparison
from megallama.verification.job import GRADIENT, PARAMETER, Difference

Tolerances = Mapping[str, float]
"""Largest error of each quantity that still counts as equal."""


def is_equal(comparison: Comparison, tolerances: Tolerances) -> bool:
    """Whether every error is within its tolerance and nothing is missing."""
    return (
        not comparison.missing
        and not comparison.broken
        and all(error <= tolerances[quantity] for quantity, error in comparison.errors.items())
    )


def likely_cause(comparison: Comparison, config: RunConfig, *, dp: int, tolerances: Tolerances) -> str:
    """One sentence; says so where the pattern tells nothing."""
    for rule in (_missing, _not_finite, _later_only, _loss, _factor, _norm_only, _one_kind, _after_first):
        for cause in rule(comparison, config, dp, tolerances):
            return cause
    if comparison.broken:
        return "the numbers agree, yet ranks differ where they must not"
    worst = max(comparison.worst.values(), key=lambda d: d.error)
    return f"no known pattern; largest in {worst.key} on rank {worst.rank}"


def _missing(c: Comparison, config: RunConfig, dp: int, t: Tolerances) -> Iterator[str]:
    if c.missing:
        yield f"no rank updates {_some(c.missing)}"


def _not_finite(c: Comparison, config: RunConfig, dp: int, t: Tolerances) -> Iterator[str]:
    if any(math.isinf(error) for error in c.errors.values()):
        worst = max(c.worst.values(), key=lambda d: d.error)
        yield f"not a number, first seen in {worst.kind} of {worst.key} on rank {worst.rank}"


def _later_only(c: Comparison, config: RunConfig, dp: int, t: Tolerances) -> Iterator[str]:
    loss, norm = c.step_errors[0]
    if loss > t[LOSS] or norm > t[GRAD_NORM] or c.errors[GRADIENT] > t[GRADIENT]:
        return
    wrong = [d for d in c.parts(PARAMETER) if d.error > t[PARAMETER]]
    late = [i for i, (a, b) in enumerate(c.step_errors) if a > t[LOSS] or b > t[GRAD_NORM]]
    if wrong and not late:
        yield f"losses agree, weights do not: the update of {_where(wrong, c)}"
    elif late:
        yield (
            f"the first step agrees, step {late[0] + 1} does not: the update (learning rate, clip, decay, Adam's"
            f" state), a copy that is not refreshed, or gradients left from the step before; {_where(wrong, c)}"
        )


def _loss(c: Comparison, config: RunConfig, dp: int, t: Tolerances) -> Iterator[str]:
    if c.step_errors[0][0] <= t[LOSS]:
        return
    factor = _name_factor(c.first_ratios[0], config, dp, tolerance=max(1e-6, 10 * t[LOSS]))
    if factor:
        yield f"the loss of the first step is off by {factor}: how it is summed over ranks and micro-batches"
    else:
        yield (
            f"the loss of the first step is {c.first_ratios[0]:.10g} times one process's: the forward differs"
            " (weights, positions, masks, a slice, or which tokens count)"
        )


def _factor(c: Comparison, config: RunConfig, dp: int, t: Tolerances) -> Iterator[str]:
    """All gradients too large or small by one factor."""
    parts = [d for d in c.parts(GRADIENT) if d.error > 0 or d.ratio != 1]
    tolerance = max(1e-6, 10 * t[GRADIENT])
    if not parts or max(d.rest for d in parts) > tolerance or c.errors[GRADIENT] <= t[GRADIENT]:
        return
    ratios = [d.ratio for d in parts]
    if max(ratios) - min(ratios) <= tolerance * max(map(abs, ratios)):
        name = _name_factor(ratios[0], config, dp, tolerance=tolerance) or f"{ratios[0]:.6g}"
        yield f"every gradient is off by {name}: the scale of the loss, or an average taken twice or not at all"
        return
    wrong = [d for d in parts if d.error > t[GRADIENT]]
    names = {_name_factor(d.ratio, config, dp, tolerance=tolerance) for d in wrong}
    if len(names) == 1 and None not in names:
        yield f"gradients of {_where(wrong, c)} are off by {names.pop()}, the others agree"


def _norm_only(c: Comparison, config: RunConfig, dp: int, t: Tolerances) -> Iterator[str]:
    if c.errors[GRADIENT] <= t[GRADIENT] and c.step_errors[0][1] > t[GRAD_NORM]:
        yield (
            f"gradients agree, their norm is {c.first_ratios[1]:.6g} times one process's: a part is left out, or"
            " copies (tp, ties, stages) are counted more than once"
        )


def _one_kind(c: Comparison, config: RunConfig, dp: int, t: Tolerances) -> Iterator[str]:
    wrong = [d for d in c.parts(GRADIENT) if d.error > t[GRADIENT]]
    if wrong and len({d.key for d in wrong}) < len({d.key for d in c.parts(GRADIENT)}):
        hint = ""
        if all("norm" in d.key for d in wrong) and config.parallel.tp > 1:
            hint = ": the sum over tp of norm weights is missing"
        elif config.model.tie_embeddings and all("embedding" in d.key for d in wrong):
            hint = ": the two uses of the tied weight are not summed"
        elif _disagree(wrong):
            hint = ": copies differ between ranks, so a sum over them is missing"
        yield f"only gradients of {_where(wrong, c)} differ{hint}"


def _after_first(c: Comparison, config: RunConfig, dp: int, t: Tolerances) -> Iterator[str]:
    if c.errors[GRADIENT] > t[GRADIENT] and c.step_errors[0][0] <= t[LOSS]:
        extent = "and so does their norm" if c.step_errors[0][1] > t[GRAD_NORM] else "their norm agrees"
        yield (
            f"the forward agrees, all gradients differ, {extent}: the backward, or micro-batches lost on the way"
            " (accumulation, its format, reduction over dp)"
        )


def _name_factor(ratio: float, config: RunConfig, dp: int, *, tolerance: float) -> str | None:
    """The axis whose size (or its inverse, or square) the ratio is."""
    parallel, train = config.parallel, config.train
    micro_batches = train.global_batch_size // (train.micro_batch_size * dp)
    sizes = {
        "dp": dp,
        "cp": parallel.cp,
        "dp x cp": dp * parallel.cp,
        "tp": parallel.tp,
        "pp": parallel.pp,
        "the number of micro-batches": micro_batches,
        "micro_batch_size": train.micro_batch_size,
        "vp": parallel.vp,
    }
    powers: tuple[tuple[str, Callable[[int], float]], ...] = (
        ("", float),
        ("1 / ", lambda n: 1 / n),
        ("the square of ", lambda n: float(n) ** 2),
    )
    # Sizes may coincide: all that fit are named.
    fitting = [
        f"{word}{name} ({size})"
        for word, power in powers
        for name, size in sizes.items()
        if size > 1 and abs(ratio - power(size)) <= tolerance * abs(power(size))
    ]
    return "a factor of " + " or ".join(fitting) if fitting else None


def _disagree(parts: Sequence[Difference]) -> bool:
    ratios: dict[str, list[float]] = {}
    for part in parts:
        ratios.setdefault(part.key, []).append(part.ratio)
    return any(len(r) > 1 and max(r) - min(r) > 1e-6 for r in ratios.values())


def _where(parts: Sequence[Difference], c: Comparison) -> str:
    """The tensors, and the stage, tp or cp rank if it is only one of several."""
    text = _some(sorted({part.key for part in parts}))
    for axis in ("pp", "tp", "cp"):
        everywhere = {getattr(report.place, axis) for report in c.reports}
        here = {getattr(c.reports[part.rank].place, axis) for part in parts}
        if len(everywhere) > 1 and len(here) == 1:
            text += f", only on {'stage' if axis == 'pp' else f'{axis} rank'} {here.pop()}"
    return text or "no single tensor"


def _some(names: Sequence[str], *, most: int = 2) -> str:
    shown = ", ".join(names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
