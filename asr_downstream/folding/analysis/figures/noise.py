"""Figure of noise: a panel for each kind, a line for each model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asr_downstream.folding.analysis.bound import Growth
from asr_downstream.folding.analysis.figures.base import GREY, figure, label_ends, plain_axes, styles
from asr_downstream.folding.analysis.noise import NoiseCurves

__all__ = ['draw_growth', 'draw_noise']

ACROSS = 3  # panels in a row


def draw_noise(path: Path, found: NoiseCurves) -> None:
    """Draw a metric against the strength of each noise.

    Args:
        path: without an ending.
        found: what was measured.
    """
    kinds = list(dict.fromkeys(curve.kind for curve in found.curves))
    looks = styles(list(dict.fromkeys(curve.arm for curve in found.curves)))
    across = min(ACROSS, len(kinds))
    down = -(-len(kinds) // across)
    low = min(0.0, *(min(curve.values) for curve in found.curves))
    high = max(max(curve.values) for curve in found.curves)
    with figure(path, down, across, (4.0 * across, 2.9 * down)) as axes:
        for axis in axes.flat[len(kinds) :]:
            axis.set_axis_off()
        for axis, kind in zip(axes.flat, kinds, strict=False):
            ends = {}
            for curve in (c for c in found.curves if c.kind == kind):
                axis.plot(curve.strengths, curve.values, **looks[curve.arm])
                ends[curve.arm] = curve.strengths[-1], curve.values[-1]
            axis.set_ylim(low, high * 1.04 if high > 0 else 1)
            plain_axes(axis, title=kind, xlabel='strength', ylabel=found.metric)
            label_ends(axis, ends, looks, gap=0.075)


def draw_growth(path: Path, runs: Sequence[Growth]) -> None:
    """Draw how noise grows in each block, and the bounds on it.

    Args:
        path: without an ending.
        runs: what was measured of each model.
    """
    blocks = list(dict.fromkeys(block.path for run in runs for block in run.blocks))
    looks = styles([run.name for run in runs])
    with figure(path, 1, 2, (9.6, 3.4), sharex=True) as axes:
        for axis, key, title in zip(axes[0], ('growth', 'bound'), ('measured, mean over images', 'bound'), strict=True):
            ends = {}
            for run in runs:
                points = [(blocks.index(b.path), getattr(b, key)) for b in run.blocks if getattr(b, key) is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), **looks[run.name])
                    ends[run.name] = points[-1]
            axis.set_yscale('log')
            axis.axhline(1, color=GREY, linewidth=0.8, linestyle=':')
            axis.set_xticks(range(len(blocks)), blocks, rotation=60, ha='right', fontsize=7, rotation_mode='anchor')
            plain_axes(axis, title=title, ylabel='growth')
            label_ends(axis, ends, looks, gap=0.07)
        axes[0, 0].figure.suptitle(f'Growth of {runs[0].noise} noise from block to block', fontsize=10)
