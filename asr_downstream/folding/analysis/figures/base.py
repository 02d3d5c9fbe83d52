"""Figures as SVG and PNG. They read without colour: one map from dark to light, markers, dashes, hatches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from asr_downstream.files.atomic import write_together

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ['GREY', 'MAP', 'figure', 'label_ends', 'plain_axes', 'save', 'spread', 'styles']

MAP = 'cividis'  # from dark to light for every eye, and in grey
GREY = '#57606a'
# Colours of Okabe and Ito, told apart by all kinds of colour vision and, with markers and dashes, without colour.
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#000000', '#cc79a7', '#56b4e9', '#e69f00')
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')
DASHES: tuple[Any, ...] = ('-', (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)), (0, (3, 1)), '-')
SETTINGS: Any = {
    'font.size': 9,
    'axes.titlesize': 9,
    'text.parse_math': False,  # a name with a $ is no formula
    'svg.hashsalt': 'asr-downstream',  # the same file each time
    'svg.fonttype': 'path',
}


def styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Line styles of names: colour, marker and dashes, each told apart by itself."""
    cycle = itertools.cycle(zip(COLOURS, MARKERS, DASHES, strict=True))
    return {
        name: {'color': colour, 'marker': marker, 'linestyle': dash, 'markersize': 4.5, 'linewidth': 1.5}
        for name, (colour, marker, dash) in zip(names, cycle, strict=False)
    }


@contextmanager
def figure(path: Path, rows: int, columns: int, size: tuple[float, float], **kwargs: Any) -> Iterator[np.ndarray]:
    """Draw on axes inside the block, and write ``path`` as ``.svg`` and ``.png``.

    Args:
        path: without an ending.
        rows: of axes.
        columns: of axes.
        size: in inches.
        **kwargs: of ``plt.subplots``.

    Yields:
        The axes, ``(rows, columns)``.
    """
    with plt.rc_context(SETTINGS):
        drawn, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout='constrained', **kwargs)
        try:
            yield axes
            save(drawn, path)
        finally:
            plt.close(drawn)


def save(drawn: Figure, path: Path) -> None:
    """Write a figure as SVG and PNG, or neither."""
    vector, picture = (path.with_name(f'{path.name}.{kind}') for kind in ('svg', 'png'))
    write_together(
        {
            vector: lambda p: drawn.savefig(p, format='svg', metadata={'Date': None}),
            picture: lambda p: drawn.savefig(p, format='png', dpi=130),
        }
    )


def plain_axes(axis: Axes, **labels: Any) -> None:
    """Take away the frame's top and right sides, and set labels."""
    axis.spines[['top', 'right']].set_visible(False)
    axis.set(**labels)


def label_ends(
    axis: Axes, ends: Mapping[str, tuple[float, float]], looks: Mapping[str, dict[str, Any]], gap: float = 0.055
) -> None:
    """Write names at the ends of lines, each behind its marker, moved apart where they would lie over each other.

    Args:
        axis: with its final limits and scale.
        ends: name -> x and y of the last point.
        looks: of `styles`.
        gap: least distance of two names, as a part of the height.
    """
    heights = {}
    for name, point in ends.items():
        _, y = axis.transAxes.inverted().transform(axis.transData.transform(point))
        heights[name] = float(np.clip(y, 0, 1))
    order = sorted(heights, key=lambda name: heights[name])
    for below, name in itertools.pairwise(order):
        heights[name] = max(heights[name], heights[below] + gap)
    within: dict[str, Any] = {'transform': axis.transAxes, 'clip_on': False}
    for name, y in heights.items():
        axis.plot([1.03], [y], **{**looks[name], **within})
        axis.text(1.055, y, name, color=looks[name]['color'], va='center', fontsize=8, **within)


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of some items, evenly, the first and the last among them."""
    places = np.unique(np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int))
    return [items[place] for place in places]
