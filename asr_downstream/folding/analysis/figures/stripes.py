"""Figures of gates: heat maps of images by channels, by timestep, and the stripe ratio along the depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from asr_downstream.folding.analysis.figures.base import GREY, MAP, figure, label_ends, plain_axes, spread, styles
from asr_downstream.folding.analysis.gates import SiteGates
from asr_downstream.folding.analysis.stripes import Stripes

__all__ = ['draw_gates', 'draw_groups', 'draw_ratios']

MOST = 6  # sites in a figure
SHOWN = 64  # images in a heat map


def draw_gates(path: Path, found: Stripes) -> None:
    """Draw the gates of some sites, from the first to the last: each image a row, each channel a column.

    Beside each heat map, mean and deviation over the images of every channel.

    Args:
        path: without an ending.
        found: what was measured.
    """
    sites = spread(found.sites, MOST)
    low, high = limits([site.rows for site in sites])
    with figure(path, len(sites), 2, (8.6, 1.55 * len(sites) + 0.5), width_ratios=(1.5, 1)) as axes:
        for (left, right), site in zip(axes, sites, strict=True):
            rows = torch.stack(spread(list(site.rows), SHOWN))
            shown = heat_map(left, rows, low, high, site)
            left.set_ylabel('image')
            left.figure.colorbar(shown, ax=left, pad=0.01, fraction=0.03)
            band(right, np.arange(len(site.mean)), site.mean, site.std)
            plain_axes(right, title=f'stripe ratio {site.constancy.ratio:.3f}', xlim=(0, max(1, len(site.mean) - 1)))
        for axis in axes[-1]:
            axis.set_xlabel('channel')
        group = sites[-1].shown
        title = f'{found.name}: gates over images' + ('' if group is None else f', {found.grouped} {group:g}')
        axes[0, 0].figure.suptitle(title + '; right: mean of each channel, and its deviation', fontsize=10)


def draw_groups(path: Path, found: Stripes) -> None:
    """Draw the gates of some sites by group, such as by timestep: each group a row, each channel a column.

    Beside each heat map, the mean over the channels, and the deviation over images of one group.

    Args:
        path: without an ending.
        found: with groups.
    """
    sites = spread([site for site in found.sites if site.groups], MOST)
    means = [torch.stack([group.mean for group in site.groups]) for site in sites]
    low, high = limits(means)
    with figure(path, len(sites), 2, (8.6, 1.55 * len(sites) + 0.5), width_ratios=(1.5, 1)) as axes:
        for (left, right), site, rows in zip(axes, sites, means, strict=True):
            values = [group.value for group in site.groups]
            shown = heat_map(left, rows, low, high, site)
            ticks = spread(range(len(values)), 4)
            left.set_yticks(ticks, [f'{values[tick]:g}' for tick in ticks])
            left.set_ylabel(found.grouped)
            left.figure.colorbar(shown, ax=left, pad=0.01, fraction=0.03)
            within = torch.stack([group.std.mean() for group in site.groups])
            band(right, np.array(values), rows.mean(1), within, marker='o')
            part = site.explained or 0.0
            plain_axes(right, title=f'{part:.0%} of the variance is due to the {found.grouped}')
        axes[-1, 0].set_xlabel('channel')
        axes[-1, 1].set_xlabel(found.grouped)
        title = f'{found.name}: gates by {found.grouped}'
        axes[0, 0].figure.suptitle(f'{title}; right: mean over channels, and deviation over images', fontsize=10)


def draw_ratios(path: Path, runs: Sequence[Stripes]) -> None:
    """Draw the stripe ratio of every site, in the order of the model, a line a run.

    Args:
        path: without an ending.
        runs: what was measured of each.
    """
    sites = list(dict.fromkeys(site.place.path for run in runs for site in run.sites))
    looks = styles([run.name for run in runs])
    with figure(path, 1, 1, (max(6.0, 0.34 * len(sites) + 3.2), 3.4)) as axes:
        axis = axes[0, 0]
        ends = {}
        for run in runs:
            points = [(sites.index(site.place.path), site.constancy.ratio) for site in run.sites]
            points = [(x, y) for x, y in points if np.isfinite(y)]
            if points:
                axis.plot(*zip(*points, strict=True), **looks[run.name])
                ends[run.name] = points[-1]
        axis.set_xticks(range(len(sites)), sites, rotation=60, ha='right', fontsize=7, rotation_mode='anchor')
        axis.set_ylim(0, axis.get_ylim()[1])
        if axis.get_ylim()[1] > 1:
            axis.axhline(1, color=GREY, linewidth=0.8, linestyle=':')
            axis.text(0, 1, 'gates move as much as channels differ', color=GREY, va='bottom', fontsize=8)
        plain_axes(axis, ylabel='stripe ratio (0: constant gates)')
        label_ends(axis, ends, looks)


def limits(rows: Sequence[Tensor]) -> tuple[float, float]:
    """Smallest and largest gate, of all sites together, so that their colours can be compared."""
    low, high = min(float(r.min()) for r in rows), max(float(r.max()) for r in rows)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def heat_map(axis: Axes, rows: Tensor, low: float, high: float, site: SiteGates) -> Any:
    """Draw rows by channels."""
    axis.set_title(f'{site.place.path} ({site.place.kind})', loc='left')
    return axis.imshow(
        rows.numpy(), cmap=MAP, vmin=low, vmax=high, aspect='auto', interpolation='nearest', rasterized=True
    )


def band(axis: Axes, x: np.ndarray, mean: Tensor, std: Tensor, **look: Any) -> None:
    """Draw a mean and the deviation around it."""
    axis.fill_between(x, (mean - std).numpy(), (mean + std).numpy(), color='#9aa4b0', alpha=0.6, linewidth=0)
    axis.plot(x, mean.numpy(), color='black', linewidth=0.9, markersize=3, **look)
    axis.ticklabel_format(useOffset=False)
