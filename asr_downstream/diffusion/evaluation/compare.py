"""Runs side by side: loss and FID by step, samples by step, tables; grids of images side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor

from asr_downstream.console.ticks import labels, log_ticks
from asr_downstream.diffusion.evaluation.pictures import grid
from asr_downstream.diffusion.evaluation.results import Result, read_results, tables
from asr_downstream.engine.trackers import read_log
from asr_downstream.errors import AsrError, DataError
from asr_downstream.files.atomic import check_writable, write_atomically, write_json

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

__all__ = ['compare_runs', 'draw_arms']

SMOOTH = 25  # lines of the log that a point of the loss curve averages
LEAST = 8  # points of a curve, if the shortest log has the lines for them
COLUMNS = 4  # steps whose samples are shown


def compare_runs(runs: Sequence[Path], out: Path, say: Callable[[str], None] = print) -> str:
    """Write ``curves.png``, ``samples.png``, ``results.json`` and the logs' summaries, and return the tables.

    Args:
        runs: folders of runs.
        out: folder to write.
        say: takes lines about what a run has not.

    Raises:
        AsrError: a run has no log, earlier results are damaged, or ``out`` cannot be written.
    """
    named = names_of(runs)
    logs = {name: read_log(run / 'log.jsonl', having='loss') for name, run in named.items()}
    for name, run in named.items():
        if not logs[name]:
            raise AsrError(f'{run}: has no log.jsonl with a line; is it a run of diffusion/train.py?')
    results = {name: read_results(run) for name, run in named.items()}
    check_writable(out)
    whole = [result for found in results.values() for result in found]
    rows = [
        {'run': result.run, 'arm': result.arm, 'step': result.step, **result.numbers, 'provenance': result.provenance}
        for result in whole
    ]
    most = min(max(1, min(len(log) for log in logs.values()) // LEAST), SMOOTH)
    curves = {name: smoothed(log, most) for name, log in logs.items()}
    points = {name: [[point['step'], point['loss']] for point in curve] for name, curve in curves.items()}
    with plt.rc_context({'text.parse_math': False}):  # a name with a $ is no formula
        draw_curves(out / 'curves.png', curves, results, most)
        draw_samples(out / 'samples.png', named, say)
    write_json(out / 'results.json', {'results': rows, 'loss': points})
    return tables(whole)


def names_of(runs: Sequence[Path]) -> dict[str, Path]:
    """Name each run by its folder; runs whose folders are called the same by their paths."""
    often = Counter(run.resolve().name for run in runs)
    return {run.resolve().name if often[run.resolve().name] == 1 else str(run): run for run in runs}


def smoothed(log: list[dict], lines: int = SMOOTH) -> list[dict]:
    """Means of ``lines`` lines."""
    groups = [log[start : start + lines] for start in range(0, len(log), lines)]
    return [{'step': g[-1]['step'], 'loss': round(float(np.mean([row['loss'] for row in g])), 5)} for g in groups]


def draw_curves(path: Path, curves: dict[str, list[dict]], results: dict[str, list[Result]], lines: int) -> None:
    """Loss, and FID where it was measured, by step."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout='constrained')
    loss, fid = axes
    drawn = []
    for name, points in curves.items():
        marker = 'o' if len(points) < LEAST else None  # a line through one point is none
        drawn += loss.plot([p['step'] for p in points], [p['loss'] for p in points], marker=marker)
        draw_fid(fid, results[name])
    loss.set(xlabel='step', ylabel=f'loss, mean of {lines} lines', yscale='log')
    fid.set(xlabel='step', ylabel='FID, own encoder' if fid.has_data() else '', yscale='log')
    labels = [f' {name}' if name.startswith('_') else name for name in curves]  # matplotlib hides those with a _
    loss.legend(drawn, labels, frameon=False, fontsize=8)
    for axis in axes:
        axis.spines[['top', 'right']].set_visible(False)
        if axis.has_data():
            plain_ticks(axis)
    try:
        write_atomically(path, lambda p: figure.savefig(p, dpi=110, format='png'))
    finally:
        plt.close(figure)


def plain_ticks(axis: Axes) -> None:
    """Give a logarithmic axis plain numbers, also where it spans less than a power of ten."""
    found = log_ticks(*axis.get_ylim())
    axis.set_yticks(found, labels(found))
    axis.set_yticks([], minor=True)


def draw_fid(axis: Axes, results: list[Result]) -> None:
    """FID of the unfolded arm by step; of the provenance that has most points, never of two."""
    groups: dict[str, list[tuple[int, float]]] = {}
    for result in results:
        if result.arm == 'unfolded' and 'fid' in result.numbers:
            groups.setdefault(str(result.provenance), []).append((result.step, result.numbers['fid']))
    if groups:
        points = sorted(groups[max(groups, key=lambda name: len(groups[name]))])
        axis.plot([step for step, _ in points], [value for _, value in points], marker='o')
    else:
        axis.plot([], [])  # so that the next run has the colour of its loss


def draw_samples(path: Path, runs: dict[str, Path], say: Callable[[str], None]) -> None:
    """Grids of the runs at the same steps, from the same noise; where a run has none, the place is left empty."""
    grids = {name: {p.name: p for p in (run / 'samples').glob('step-*.png')} for name, run in runs.items()}
    for name, found in grids.items():
        if not found:
            say(f'{name}: has no samples')
    grids = {name: found for name, found in grids.items() if found}
    steps = sorted(set().union(*grids.values()))
    if not steps:
        return
    shared = sorted(set.intersection(*map(set, grids.values())))
    chosen = spread(shared, COLUMNS - 1) + [steps[-1]] if shared and shared[-1] != steps[-1] else spread(steps, COLUMNS)
    size = (2.6 * len(chosen), 2.75 * len(grids))
    figure, axes = plt.subplots(len(grids), len(chosen), figsize=size, squeeze=False, layout='constrained')
    for row, (name, found) in zip(axes, grids.items(), strict=True):
        for axis, file in zip(row, chosen, strict=True):
            axis.set_axis_off()
            if file in found:
                axis.imshow(read_picture(found[file]))
                axis.set_title(f'{name}, step {int(file[5:-4])}', fontsize=8)
    try:
        write_atomically(path, lambda p: figure.savefig(p, dpi=75, format='png'))
    finally:
        plt.close(figure)


def spread(names: Sequence[str], most: int) -> list[str]:
    """At most so many of some names, evenly, the first and the last among them."""
    return [names[i] for i in np.unique(np.linspace(0, len(names) - 1, min(most, len(names))).round().astype(int))]


def read_picture(path: Path) -> np.ndarray:
    """Read a grid of samples.

    Raises:
        DataError: it is damaged.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert('RGB'))
    except Exception as error:  # decoders raise anything for damaged files
        raise DataError(f'{path}: cannot be decoded ({error}); delete it') from error


def draw_arms(out: Path, arms: dict[str, Tensor], captions: dict[str, str] | None = None, columns: int = 8) -> None:
    """Write grids of several arms side by side.

    Args:
        out: PNG file.
        arms: head of the grid -> images ``(N, C, H, W)`` in [0, 1].
        captions: second line of a head.
        columns: of each grid.
    """
    across = min(2, len(arms))
    down = ceil(len(arms) / across)
    rows = ceil(max(len(images) for images in arms.values()) / columns)
    size = (4.8 * across, (4.8 * rows / columns + 0.55) * down)
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout='constrained')
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (name, images) in zip(axes.flat, arms.items(), strict=False):
        axis.imshow(np.asarray(grid(images, columns, smooth=True)))
        axis.set_title('\n'.join(filter(None, [name, (captions or {}).get(name, '')])), fontsize=11)
    write_atomically(out, lambda p: figure.savefig(p, dpi=90, format='png'))
    plt.close(figure)
