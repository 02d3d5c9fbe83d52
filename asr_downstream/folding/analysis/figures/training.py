"""Figure of gates over a training: how the stripes form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asr_downstream.folding.analysis.figures.base import MAP, figure, label_ends, plain_axes, spread, styles

__all__ = ['draw_training']

MOST = 4  # sites in a figure


def draw_training(path: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the mean gate of each channel by step, of some sites, and below the stripe ratio of these sites.

    Args:
        path: without an ending.
        name: of the run.
        rows: lines of ``gates.jsonl``.
    """
    sites = spread(list(rows[-1]['sites']), MOST)
    rows = [row for row in rows if all(site in row['sites'] for site in sites)]
    steps = [row['step'] for row in rows]
    maps = {site: np.array([row['sites'][site]['channel_means'] for row in rows]) for site in sites}
    low, high = min(m.min() for m in maps.values()), max(m.max() for m in maps.values())
    looks = styles(sites)
    with figure(path, len(sites) + 1, 1, (7.4, 1.3 * len(sites) + 2.8), height_ratios=[1] * len(sites) + [1.9]) as axes:
        for axis, site in zip(axes[:-1, 0], sites, strict=True):
            shown = axis.imshow(maps[site], cmap=MAP, vmin=low, vmax=high, aspect='auto', interpolation='nearest')
            ticks = spread(range(len(steps)), 3)
            axis.set_yticks(ticks, [str(steps[tick]) for tick in ticks])
            axis.set_title(site, loc='left')
            axis.set_ylabel('step')
            axis.figure.colorbar(shown, ax=axis, pad=0.01, fraction=0.03)
        axes[-2, 0].set_xlabel('channel')
        last, ends = axes[-1, 0], {}
        for site in sites:
            ratios = [row['sites'][site]['stripe_ratio'] for row in rows]
            points = [(x, y) for x, y in zip(steps, ratios, strict=True) if y is not None]
            if points:
                last.plot(*zip(*points, strict=True), **looks[site])
                ends[site] = points[-1]
        last.set_ylim(0, max(1e-9, last.get_ylim()[1]))
        plain_axes(last, xlabel='step', ylabel='stripe ratio')
        label_ends(last, ends, looks, gap=0.09)
        last.figure.suptitle(f'{name}: mean gates of each channel over the training, and the stripe ratio', fontsize=10)
