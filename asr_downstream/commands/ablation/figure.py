"""The figure of an ablation: values by seed, and differences by seed with their intervals.

Seeds differ by their markers and not by colours; it reads in grey.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

from asr_downstream.commands.ablation.statistics import Comparison, Metric
from asr_downstream.files.atomic import write_atomically

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

__all__ = ['draw']

MARKERS = 'o^svDP*Xhp<>d8'  # of the seeds
INK, PALE, BLUE = '#1f2328', '#8c959f', '#0b4fa8'
FORMATS: dict[str, dict[str, Any]] = {'svg': {'metadata': {'Date': None}}, 'png': {'dpi': 130}}
STYLE: Any = {'text.parse_math': False, 'svg.fonttype': 'none', 'svg.hashsalt': 'ablation', 'font.size': 9}


def draw(
    path: Path,
    values: Mapping[str, Mapping[int, float]],
    comparisons: Mapping[str, Comparison],
    labels: Mapping[str, str],
    metric: Metric,
) -> None:
    """Write the figure as SVG and PNG.

    Args:
        path: of the files, without suffix.
        values: arm -> seed -> value; the first arm is the reference.
        comparisons: arm -> comparison.
        labels: arm -> name.
        metric: what is shown.
    """
    seeds = sorted({seed for found in values.values() for seed in found})
    markers = {seed: MARKERS[number % len(MARKERS)] for number, seed in enumerate(seeds)}
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(8.5, 1.5 + 0.42 * len(values)), layout='constrained', sharey=True
        )
        for row, (arm, found) in enumerate(values.items()):
            for seed, value in found.items():
                point(left, value * metric.scale, row, markers[seed])
            left.vlines(sum(found.values()) / len(found) * metric.scale, row - 0.3, row + 0.3, color=INK, linewidth=1.5)
            if arm in comparisons:
                draw_difference(right, comparisons[arm], row, markers, metric)
        reference = labels[next(iter(values))]
        better = 'right' if metric.higher else 'left'
        left.set(xlabel=f'{metric.name}; line: mean')
        left.set_yticks(range(len(values)), [labels[arm] for arm in values])
        left.set_ylim(len(values) - 0.5, -0.5)
        right.axvline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        right.set(xlabel=f'{metric.name} - {reference}, by seed; 95% t interval\n{better} is better')
        shown = [plt.Line2D([], [], linestyle='', color=PALE, markeredgecolor=INK, marker=m) for m in markers.values()]
        names = [f'seed {seed}' for seed in seeds]
        figure.legend(shown, names, loc='outside upper center', ncols=min(8, len(seeds)), frameon=False)
        for axis in (left, right):
            axis.spines[['top', 'right', 'left']].set_visible(False)
            axis.tick_params(axis='y', length=0)
            axis.grid(axis='y', color='#d0d7de', linewidth=0.6)
            axis.set_axisbelow(True)
            axis.locator_params(axis='x', nbins=6)
        try:
            for suffix, options in FORMATS.items():
                save = partial(figure.savefig, format=suffix, **options)
                write_atomically(path.with_suffix(f'.{suffix}'), save)
        finally:
            plt.close(figure)


def draw_difference(axis: Axes, comparison: Comparison, row: int, markers: Mapping[int, str], metric: Metric) -> None:
    """Differences of an arm by seed, their mean and its interval; bold where there is a verdict for or against it."""
    for seed, difference in zip(comparison.seeds, comparison.differences, strict=True):
        point(axis, difference * metric.scale, row - 0.16, markers[seed])
    if math.isnan(comparison.mean):
        return
    sure = comparison.outcome in ('better', 'worse')
    mean = comparison.mean * metric.scale
    if not math.isnan(comparison.p):
        ends = [comparison.low * metric.scale, comparison.high * metric.scale]
        axis.plot(ends, [row + 0.16] * 2, color=BLUE if sure else INK, linewidth=3 if sure else 1.3, marker='|')
    fill, edge = (BLUE, BLUE) if sure else ('white', INK)
    axis.plot([mean], [row + 0.16], marker='D', markersize=6, color=fill, markeredgecolor=edge)


def point(axis: Axes, x: float, y: float, marker: str) -> None:
    """One seed."""
    axis.plot([x], [y], marker=marker, linestyle='', color=PALE, markeredgecolor=INK, markeredgewidth=0.7, markersize=6)
