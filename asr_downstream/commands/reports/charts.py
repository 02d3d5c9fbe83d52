"""Geometry of charts: ticks that can be read, and points in the units of a picture. Templates draw them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from asr_downstream.commands.reports.page import Arms, Chart
from asr_downstream.console.ticks import labels, log_ticks, ticks

__all__ = ['Axis', 'drawn', 'drawn_arms', 'number']

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 12, 48
SEEDS = 10  # marks of seeds: five shapes, filled and hollow
STYLES = 7  # of lines, see the style sheet; more lines repeat them with other markers
NAMES = 132  # width of the names of arms
ROW = 44


@dataclass(frozen=True)
class Axis:
    """A scale: values to positions.

    Attributes:
        low, high: values at the ends.
        start, end: their positions.
        log: whether it is logarithmic.
        marks: value and text of the ticks.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool
    marks: Sequence[tuple[float, str]]

    def at(self, value: float) -> float:
        """Position of a value."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    @property
    def positions(self) -> list[tuple[float, str]]:
        """Position and text of the ticks."""
        return [(self.at(value), text) for value, text in self.marks]


def axis(values: Sequence[float], start: float, end: float, log: bool = False, count: int = 5) -> Axis:
    """Make a scale on which all values are, with ticks."""
    low, high = min(values), max(values)
    log = log and low > 0
    if low == high:
        step = abs(low) / 10 or 1.0
        low, high = (low / 1.2, high * 1.2) if log else (low - step, high + step)
    marks = log_ticks(low, high) if log else ticks(low, high, count)
    texts = labels(marks)
    if not log:
        edge = (high - low) * 0.04
        low, high = min(low - edge, *marks), max(high + edge, *marks)
    else:
        low, high = min(low, *marks), max(high, *marks)
    return Axis(low, high, start, end, log, list(zip(marks, texts, strict=True)))


def number(value: float) -> str:
    """A coordinate."""
    return f'{value:.1f}'.rstrip('0').rstrip('.')


def drawn(chart: Chart) -> dict[str, Any] | None:
    """What the template of a chart draws; None: there is nothing to draw."""
    curves = [curve for curve in chart.curves if curve.points]
    if not curves:
        return None
    across = axis([x for curve in curves for x, _ in curve.points], LEFT, WIDTH - RIGHT)
    up = axis([y for curve in curves for _, y in curve.points], HEIGHT - BOTTOM, TOP, chart.log)
    lines = []
    for place, curve in enumerate(curves):
        points = [(across.at(x), up.at(y)) for x, y in curve.points]
        lines.append(
            {
                'name': curve.name,
                'style': place % STYLES,
                'marker': place % 5,
                'path': ' '.join(f'{number(x)},{number(y)}' for x, y in points),
                'marks': points if len(points) <= 6 else points[:: max(1, len(points) // 5)],
                'last': curve.points[-1][1],
            }
        )
    return {
        'width': WIDTH,
        'height': HEIGHT,
        'left': LEFT,
        'right': WIDTH - RIGHT,
        'top': TOP,
        'bottom': HEIGHT - BOTTOM,
        'x': across.positions,
        'y': up.positions,
        'lines': lines,
        'log': up.log,
    }


def drawn_arms(arms: Arms) -> dict[str, Any] | None:
    """What the template of differences draws; None: there is nothing to draw."""
    values = [0.0]
    for arm in arms.arms:
        values += [value for _, value in arm.points] + list(arm.ends or ())
    if len(values) == 1:
        return None
    across = axis(values, NAMES + 10, WIDTH - RIGHT)
    bottom = TOP + ROW * len(arms.arms)
    names = list(dict.fromkeys(name for arm in arms.arms for name, _ in arm.points))
    rows = []
    for place, arm in enumerate(arms.arms):
        y = TOP + ROW * (place + 0.5)
        rows.append(
            {
                'name': arm.name,
                'text': arm.text,
                'y': y,
                'points': [(across.at(value), names.index(name) % SEEDS, name) for name, value in arm.points],
                'middle': None if arm.middle is None else across.at(arm.middle),
                'ends': None if arm.ends is None else [across.at(value) for value in arm.ends],
                'sure': arm.sure,
            }
        )
    return {
        'width': WIDTH,
        'height': bottom + BOTTOM,
        'left': NAMES + 10,
        'right': WIDTH - RIGHT,
        'top': TOP,
        'bottom': bottom,
        'zero': across.at(0.0),
        'x': across.positions,
        'rows': rows,
        'names': [(name, place % SEEDS) for place, name in enumerate(names)],
    }
