"""Figure of correlations: a matrix for each stage, a row of them for each run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from asr_downstream.folding.analysis.correlation import Correlations, StageCorrelation
from asr_downstream.folding.analysis.figures.base import MAP, figure

__all__ = ['draw_correlations']

WRITTEN = 6  # sites up to which the numbers are written into the squares


def draw_correlations(path: Path, runs: Sequence[Correlations]) -> None:
    """Draw the matrices of all stages.

    Args:
        path: without an ending.
        runs: what was measured of each.
    """
    most = max(len(run.stages) for run in runs)
    size = (2.15 * most + 0.9, 2.3 * len(runs) + 0.4)
    with figure(path, len(runs), most, size) as axes:
        shown: Any = None
        for row, run in zip(axes, runs, strict=True):
            for axis in row[len(run.stages) :]:
                axis.set_axis_off()
            for axis, stage in zip(row, run.stages, strict=False):
                shown = draw_stage(axis, stage)
            row[0].set_ylabel(f'{run.name}\nblock')
        for axis in axes[-1]:
            axis.set_xlabel('block')
        drawn = axes[0, 0].figure
        drawn.colorbar(shown, ax=axes, fraction=0.02, label='correlation of gates over channels')
        drawn.suptitle('Correlation of the gates of the sites of a stage, mean over images', fontsize=10)


def draw_stage(axis: Axes, stage: StageCorrelation) -> Any:
    """Draw one matrix; squares without a correlation are crossed."""
    matrix = stage.matrix.numpy()
    shown = axis.imshow(matrix, cmap=MAP, vmin=-1, vmax=1, interpolation='nearest')
    ticks = np.arange(0, len(matrix), max(1, len(matrix) // 6))
    axis.set_xticks(ticks, ticks + 1)
    axis.set_yticks(ticks, ticks + 1)
    mean = f'mean {stage.mean:.2f}' if np.isfinite(stage.mean) else 'none'
    axis.set_title(f'{stage.stage or "model"}\n{"shared" if stage.unit else "own"}: {mean}', fontsize=8)
    for y, row in enumerate(matrix):
        for x, value in enumerate(row):
            if not np.isfinite(value):
                axis.text(x, y, '×', ha='center', va='center')
            elif len(matrix) <= WRITTEN:
                colour = 'black' if value > 0.1 else 'white'
                axis.text(x, y, f'{value:.2f}', ha='center', va='center', color=colour, fontsize=7)
    return shown
