"""Figure of costs: a panel for each quantity, a bar for each site."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from asr_downstream.folding.analysis.cost import Costs
from asr_downstream.folding.analysis.figures.base import figure, plain_axes, styles

__all__ = ['draw_costs']

PANELS = {
    'parameters': 'parameters',
    'macs': 'MACs',
    'launches': 'launches, inference',
    'training_launches': 'launches, training forward',
    'saved_bytes': 'saved bytes',
    'milliseconds': 'milliseconds',
}
HATCHES = ('', '///', '...', 'xxx', '\\\\\\', '++', 'oo')


def draw_costs(path: Path, runs: Sequence[Costs]) -> None:
    """Draw what attention adds at each site, for several models side by side.

    Args:
        path: without an ending.
        runs: what was measured of each.
    """
    rows = {run.name: (*run.sites, run.elsewhere) for run in runs}
    sites = list(dict.fromkeys(site.path for run in runs for site in run.sites)) + [runs[0].elsewhere.path]
    looks = styles([run.name for run in runs])
    height = 0.8 / len(runs)
    size = (13.0, max(2.4, (0.13 + 0.11 * len(runs)) * len(sites) + 1.3))
    with figure(path, 1, len(PANELS), size, sharey=True) as axes:
        for axis, (key, title) in zip(axes[0], PANELS.items(), strict=True):
            for number, run in enumerate(runs):
                at = [sites.index(site.path) + number * height for site in rows[run.name]]
                bars = {
                    'color': looks[run.name]['color'],
                    'hatch': HATCHES[number % len(HATCHES)],
                    'edgecolor': 'white',
                    'linewidth': 0.3,
                }
                axis.barh(at, [getattr(site, key) for site in rows[run.name]], height, label=run.name, **bars)
            plain_axes(axis, title=title)
            axis.tick_params(axis='x', labelsize=7)
            axis.locator_params(axis='x', nbins=4)
        first = axes[0, 0]
        first.set_yticks(np.arange(len(sites)) + 0.4 - height / 2, sites, fontsize=7)
        first.invert_yaxis()
        drawn = first.figure
        drawn.legend(
            *first.get_legend_handles_labels(), loc='outside lower center', ncols=min(4, len(runs)), frameon=False
        )
        drawn.suptitle(f'What attention adds at each site, batch {runs[0].batch}', fontsize=10)
