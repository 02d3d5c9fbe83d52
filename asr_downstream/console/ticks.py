"""Ticks of axes: round numbers, as plain texts."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ['labels', 'log_ticks', 'ticks']

FACTORS = ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))  # of the ticks of a logarithmic axis
LEAST = 3


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two values, about so many: steps of 1, 2, 2.5 or 5 times a power of ten."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round(number * step, digits) for number in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Numbers between two positive values, as many as may be: 1, 1.5, 2, 3, 5 and 7 times powers of ten, or fewer.

    Where these are too few, numbers in equal steps.
    """
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for factors in FACTORS:
        every = [float(f'{factor}e{power}') for power in powers for factor in factors]
        found = [value for value in every if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(found) <= most:
            break
    if len(found) < LEAST:
        return [value for value in ticks(low, high) if value > 0]
    return found[:: math.ceil(len(found) / most)]


def labels(values: Sequence[float]) -> list[str]:
    """Texts of ticks: as many digits as they need to differ, 12,000 as 12k."""
    if any(value and (abs(value) < 1e-4 or abs(value) >= 1e9) for value in values):
        return [f'{value:.3g}' for value in values]
    scale, suffix = next(
        ((s, t) for s, t in ((1e6, 'M'), (1e3, 'k')) if max(map(abs, values), default=0) >= 10 * s), (1, '')
    )
    shown = [value / scale for value in values]
    digits = next((d for d in range(7) if all(abs(round(v, d) - v) < 1e-9 for v in shown)), 6)
    return [f'{value:.{digits}f}{suffix if value else ""}' for value in shown]
