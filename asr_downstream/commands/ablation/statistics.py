"""Paired comparisons over seeds: differences to a reference arm, a t interval, Holm's correction, a verdict.

Runs of one seed share their initial stock weights and the order of the data, so what is compared is the difference
seed by seed. Its mean has a two-sided t interval. Several arms against one reference are several chances to be wrong:
a verdict needs a p below 0.05 after Holm's correction over all arms, which holds the chance of any false verdict to 5%.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    'LEAST',
    'LEVEL',
    'Comparison',
    'Metric',
    'compare',
    'holm',
    'overall',
    'paired_t',
    't_quantile',
    'two_sided',
]

LEVEL = 0.05  # of false verdicts
LEAST = 3  # seeds that a verdict needs
SAME = 1e-12  # numbers that are closer, relative to their size, differ by rounding

Array = NDArray[np.float64]


class Metric(NamedTuple):
    """What is measured.

    Attributes:
        name: ``'AP'``.
        higher: whether more is better.
        form: how a value is written, ``'.3f'``.
        step: what values were rounded to before they came here; 0: not at all.
        scale: what a value is multiplied by to be written, 100 for percent.
    """

    name: str
    higher: bool = True
    form: str = '.3f'
    step: float = 0.0
    scale: float = 1.0

    def text(self, value: float, sign: bool = False) -> str:
        """Write a value, or a difference with its sign."""
        found = f'{value * self.scale:{"+" if sign else ""}{self.form}}'
        return found if float(found) else found.replace('-', '+' if sign else '')  # no -0.000


@dataclass(frozen=True)
class Comparison:
    """An arm against the reference.

    Attributes:
        arm, reference: their labels.
        metric: what is compared.
        seeds: those that both have.
        differences: of the arm to the reference, seed by seed.
        mean, std: of the differences.
        low, high: ends of the 95% t interval of the mean, of this arm alone; NaN for fewer than two seeds.
        p: two-sided, of this arm alone; NaN for fewer than `LEAST` seeds.
        corrected: the same after Holm's correction over all arms.
        arms: how many were corrected over.
    """

    arm: str
    reference: str
    metric: Metric
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    std: float
    low: float
    high: float
    p: float
    corrected: float
    arms: int

    @property
    def outcome(self) -> str:
        """``'better'``, ``'worse'``, ``'undecided'``, ``'equal'`` (no difference in any seed), or ``'none'``.

        There is no verdict (``'none'``) on fewer than `LEAST` seeds, or where all differences are one number other
        than zero, so that nothing is known about their spread.
        """
        if math.isnan(self.p):
            return 'none'
        if not any(self.differences):
            return 'equal'
        if self.corrected >= LEVEL:
            return 'undecided'
        return 'better' if (self.mean > 0) == self.metric.higher else 'worse'

    @property
    def short(self) -> str:
        """The outcome for a table."""
        return 'no verdict' if self.outcome == 'none' else self.outcome

    def __str__(self) -> str:
        """The verdict in one sentence."""
        name = f'{self.metric.name}{"" if self.metric.higher else " (lower is better)"}'
        count = len(self.seeds)
        if not count:
            return f'{self.arm} - {self.reference}: no verdict, no seed has both'
        said = f'{self.arm} - {self.reference}: {self.metric.text(self.mean, True)} {name}'
        if count < LEAST:
            what = 'one seed' if count == 1 else f'{count} seeds'
            return f'{said} over {what}: no verdict, {LEAST} seeds are the least'
        if self.outcome == 'equal':
            return f'{self.arm} - {self.reference}: no difference in {name} in any of {count} seeds'
        if self.outcome == 'none':
            return f'{said} in each of {count} seeds: no verdict, their spread is not known'
        ends = f'[{self.metric.text(self.low, True)}, {self.metric.text(self.high, True)}]'
        return f'{said}, 95% interval {ends}: {self.advice}'

    @property
    def advice(self) -> str:
        """What the numbers say to do."""
        if self.outcome == 'better':
            return 'it helps here'
        if self.outcome == 'worse':
            return 'do not use it here'
        if self.p < LEVEL:
            return f'undecided (p = {self.p:.2g}, but {self.corrected:.2g} as one of {self.arms} arms)'
        return f'undecided (p = {self.corrected:.2g})'


def compare(
    values: Mapping[str, Mapping[int, float]], reference: str, metric: Metric, labels: Mapping[str, str] | None = None
) -> dict[str, Comparison]:
    """Compare every arm with the reference.

    Args:
        values: arm -> seed -> value, which is finite.
        reference: one of the arms.
        metric: what the values are.
        labels: arm -> how sentences name it.

    Returns:
        Arm -> its comparison, in the order of ``values``.
    """
    base, labels = values[reference], labels or {}
    found: dict[str, dict[str, Any]] = {}
    for arm in values:
        if arm == reference:
            continue
        seeds = tuple(seed for seed in base if seed in values[arm])
        differences = np.array([values[arm][seed] - base[seed] for seed in seeds])
        size = max((abs(base[seed]) for seed in seeds), default=0.0)
        differences[np.abs(differences) <= SAME * size] = 0.0
        found[arm] = {'seeds': seeds, 'differences': tuple(differences.tolist()), **summary(differences, metric, size)}
    known = {arm: about['p'] for arm, about in found.items() if not math.isnan(about['p'])}
    corrected = dict(zip(known, holm(list(known.values())).tolist(), strict=True))
    return {
        arm: Comparison(
            labels.get(arm, arm),
            labels.get(reference, reference),
            metric,
            **about,
            corrected=corrected.get(arm, math.nan),
            arms=len(known),
        )
        for arm, about in found.items()
    }


def summary(differences: Array, metric: Metric, size: float) -> dict[str, float]:
    """Mean, spread, interval and p of the differences of one arm; see `Comparison`."""
    count = len(differences)
    mean = float(differences.mean()) if count else math.nan
    if count < 2:
        return {'mean': mean, 'std': math.nan, 'low': math.nan, 'high': math.nan, 'p': math.nan}
    std = float(differences.std(ddof=1))
    if std <= SAME * size:
        std = 0.0
    half, p = paired_t(differences, metric.step)
    known = count >= LEAST and (std > 0 or metric.step > 0 or not differences.any())
    return {
        'mean': mean,
        'std': std,
        'low': mean - float(half),
        'high': mean + float(half),
        'p': float(p) if known else math.nan,
    }


def paired_t(differences: ArrayLike, step: float = 0.0) -> tuple[Array, Array]:
    """Half the width of the 95% t interval of the mean, and the two-sided p of the mean being zero.

    Args:
        differences: ``(..., seeds)``, at least two seeds.
        step: what the values were rounded to. The spread of rounded numbers is not known better than the rounding,
            whose standard deviation is ``step / sqrt(6)`` for a difference of two: the spread is taken to be at least
            that.

    Returns:
        Arrays of the shape ``(...)``.
    """
    differences = np.asarray(differences, float)
    count = differences.shape[-1]
    mean = differences.mean(-1)
    error = np.maximum(differences.std(-1, ddof=1), step / math.sqrt(6)) / math.sqrt(count)
    with np.errstate(divide='ignore', invalid='ignore'):
        t = np.where(mean == 0, 0.0, np.abs(mean) / error)
    return t_quantile(count - 1) * error, two_sided(t, count - 1)


def two_sided(t: ArrayLike, freedom: int) -> Array:
    """Chance that the size of a t variable is at least ``t``.

    The finite series for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    angle = np.arctan2(np.abs(np.asarray(t, float)), math.sqrt(freedom))
    odd = freedom % 2
    cosine = np.cos(angle)
    term = cosine if odd else np.ones_like(angle)
    total = np.zeros_like(angle)
    for power in range(odd, freedom - 1, 2):
        total = total + term
        term = term * cosine**2 * (power + 1) / (power + 2)
    inside = np.sin(angle) * total
    return np.clip(1 - (2 / math.pi * (angle + inside) if odd else inside), 0.0, 1.0)


@cache
def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """The t that is reached with chance ``level`` in size: 4.303 for 2 degrees of freedom."""
    low, high = 0.0, 1e6
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, freedom) > level else (low, middle)
    return (low + high) / 2


def holm(p: ArrayLike) -> Array:
    """Holm's corrected p, of tests along the last axis: rejecting those below a level errs at most that often at all.

    The smallest is multiplied by the number of tests, the next by one less, and so on; none may be below one before.
    """
    p = np.asarray(p, float)
    order = np.argsort(p, -1)
    ranked = np.take_along_axis(p, order, -1) * np.arange(p.shape[-1], 0, -1)
    found = np.empty_like(p)
    np.put_along_axis(found, order, np.minimum(np.maximum.accumulate(ranked, -1), 1.0), -1)
    return found


def overall(comparisons: Sequence[Comparison]) -> str:
    """The answer in one line: which arm to use here, if any."""
    if not comparisons:
        return 'No verdict: there is one arm only.'
    reference = comparisons[0].reference
    judged = [c for c in comparisons if c.outcome != 'none']
    better = sorted((c for c in judged if c.outcome == 'better'), key=lambda c: -abs(c.mean))
    if not judged:
        most = max(len(c.seeds) for c in comparisons)
        if most >= LEAST:
            return 'No verdict: the spread over seeds is not known.'
        return f'No verdict: {most} {"seed" if most == 1 else "seeds"} in common, {LEAST} are the least.'
    if better:
        names = ' and '.join(c.arm for c in better)
        return f'{names} {"is" if len(better) == 1 else "are"} better than {reference} here.'
    if all(c.outcome == 'worse' for c in judged):
        every = len(judged) == len(comparisons) > 1
        names = 'every other arm' if every else ' and '.join(c.arm for c in judged)
        return f'Keep {reference} here: {names} {"is" if every or len(judged) == 1 else "are"} worse.'
    return f'Keep {reference} here: no arm is shown to be better.'
