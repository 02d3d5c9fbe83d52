"""Runs side by side: loss and FID by step, samples by step, tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from asr_downstream.engine.reporting import read_log
from asr_downstream.errors import AsrError
from asr_downstream.files import write_atomically, write_json
from asr_downstream.generation.results import read_results, tables

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

__all__ = ['compare_runs']

SMOOTH = 25  # lines of the log that a point of the loss curve averages
COLUMNS = 4  # steps whose samples are shown


def compare_runs(runs: Sequence[Path], out: Path) -> str:
    """Write ``curves.png``, ``samples.png``, ``results.json`` and the logs' summaries, and return the tables.

    Args:
        runs: folders of runs.
        out: folder to write.

    Raises:
        AsrError: a run has no log.
    """
    logs = {run.name: read_log(run / 'log.jsonl', having='loss') for run in runs}
    for run in runs:
        if not logs[run.name]:
            raise AsrError(f'{run}: has no log.jsonl with a line; is it a run of diffusion/train.py?')
    results = [result for run in runs for result in read_results(run)]
    out.mkdir(parents=True, exist_ok=True)
    draw_curves(out / 'curves.png', runs, logs)
    draw_samples(out / 'samples.png', runs)
    rows = [
        {'run': result.run, 'arm': result.arm, 'step': result.step, **result.numbers, 'provenance': result.provenance}
        for result in results
    ]
    curves = {name: [[row['step'], row['loss']] for row in smoothed(log)] for name, log in logs.items()}
    write_json(out / 'results.json', {'results': rows, 'loss': curves})
    return tables(results)


def smoothed(log: list[dict]) -> list[dict]:
    """Means of `SMOOTH` lines."""
    groups = [log[start : start + SMOOTH] for start in range(0, len(log), SMOOTH)]
    return [{'step': g[-1]['step'], 'loss': round(float(np.mean([row['loss'] for row in g])), 5)} for g in groups]


def draw_curves(path: Path, runs: Sequence[Path], logs: dict[str, list[dict]]) -> None:
    """Loss, and FID where it was measured, by step."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout='constrained')
    loss, fid = axes
    for run in runs:
        points = smoothed(logs[run.name])
        loss.plot([p['step'] for p in points], [p['loss'] for p in points], label=run.name)
        draw_fid(fid, run)
    loss.set(xlabel='step', ylabel=f'loss, mean of {SMOOTH} lines', yscale='log')
    fid.set(xlabel='step', ylabel='FID, own encoder' if fid.has_data() else '', yscale='log')
    loss.legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.spines[['top', 'right']].set_visible(False)
    write_atomically(path, lambda p: figure.savefig(p, dpi=110, format='png'))
    plt.close(figure)


def draw_fid(axis: Axes, run: Path) -> None:
    """FID of the unfolded arm by step; of the provenance that has most points, never of two."""
    groups: dict[str, list[tuple[int, float]]] = {}
    for result in read_results(run):
        if result.arm == 'unfolded' and 'fid' in result.numbers:
            groups.setdefault(str(result.provenance), []).append((result.step, result.numbers['fid']))
    if groups:
        points = sorted(groups[max(groups, key=lambda name: len(groups[name]))])
        axis.plot([step for step, _ in points], [value for _, value in points], marker='o', label=run.name)


def draw_samples(path: Path, runs: Sequence[Path]) -> None:
    """Grids of every run at the same steps: they start from the same noise."""
    steps = sorted(set.intersection(*({p.name for p in (run / 'samples').glob('step-*.png')} for run in runs)))
    if not steps:
        return
    chosen = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, min(COLUMNS, len(steps))).round().astype(int))]
    size = (2.6 * len(chosen), 2.75 * len(runs))
    figure, axes = plt.subplots(len(runs), len(chosen), figsize=size, squeeze=False, layout='constrained')
    for row, run in zip(axes, runs, strict=True):
        for axis, name in zip(row, chosen, strict=True):
            axis.imshow(np.asarray(Image.open(run / 'samples' / name)))
            axis.set(xticks=[], yticks=[])
            axis.set_title(f'{run.name}, step {int(name[5:-4])}', fontsize=8)
    write_atomically(path, lambda p: figure.savefig(p, dpi=75, format='png'))
    plt.close(figure)
