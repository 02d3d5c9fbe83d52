"""One analysis of several runs: tables for the terminal, ``<analysis>.json``, and figures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asr_downstream.errors import AsrError
from asr_downstream.files.atomic import check_writable, write_json
from asr_downstream.folding.analysis.bound import Growth, measure_growth
from asr_downstream.folding.analysis.correlation import find_correlations
from asr_downstream.folding.analysis.cost import measure_costs
from asr_downstream.folding.analysis.noise import STRENGTHS, ImageNoise, NoiseCurves, noise_kinds, sweep
from asr_downstream.folding.analysis.runs import OpenRun, Wanted, open_run
from asr_downstream.folding.analysis.stripes import find_stripes
from asr_downstream.folding.analysis.training import FILE, read_training
from asr_downstream.folding.calibrated import fold_calibrated
from asr_downstream.folding.exact import fold_exactly
from asr_downstream.measure.versions import versions
from asr_downstream.plugging.describe import describe

__all__ = ['Job', 'correlation', 'cost', 'noise', 'stripes']


GROWING = 'gaussian'  # the noise whose growth is measured


@dataclass(frozen=True)
class Job:
    """What is analysed, and where the results go.

    Every analysis of this module takes one, returns the tables, and raises AsrError where a run cannot be opened, has
    not what it looks at, or ``out`` cannot be written.

    Attributes:
        runs: name -> folder of a training, a checkpoint in it, or a file of weights.
        out: folder to write.
        wanted: images and options.
        kind: of the runs; default: what their files say.
    """

    runs: Mapping[str, Path]
    out: Path
    wanted: Wanted = Wanted()
    kind: str | None = None

    def opened(self) -> Iterator[tuple[str, OpenRun]]:
        """Open the runs, one after another: only one is in memory."""
        check_writable(self.out)
        files: dict[Path, str] = {}
        for name in self.runs:
            other = files.setdefault(self.path(name), name)
            if other != name:
                raise AsrError(f'{other} and {name}: their figures would have one name; name them otherwise, NAME=RUN')
        for name, path in self.runs.items():
            yield name, open_run(path, self.wanted, self.kind)

    def path(self, *parts: str) -> Path:
        """Where a figure goes, without its ending; names of runs are turned into names of files."""
        return self.out / '-'.join(re.sub(r'[^\w.=-]+', '-', part).strip('-.') or 'run' for part in parts)

    def write(self, analysis: str, runs: Mapping[str, Mapping[str, Any]], **more: Any) -> None:
        """Write ``<analysis>.json``.

        Args:
            analysis: its name.
            runs: name -> what was measured, with the facts of the run.
            **more: further keys.
        """
        content = {'analysis': analysis, 'images': self.wanted.images, **more, 'runs': dict(runs)}
        write_json(self.out / f'{analysis}.json', {**content, 'versions': versions()})


def stripes(job: Job, metric: bool = True) -> str:
    """Measure and draw how much gates depend on the image, see `asr_downstream.folding.analysis.stripes`.

    Args:
        job: what is analysed.
        metric: whether to measure the metric before and after the gates are replaced by their means.
    """
    from asr_downstream.folding.analysis.figures.stripes import draw_gates, draw_groups, draw_ratios
    from asr_downstream.folding.analysis.figures.training import draw_training

    measured, content = [], {}
    for name, run in job.opened():
        found = find_stripes(name, run.model, run.data(), run.step, run.metric if metric else None, run.by, run.grouped)
        measured.append(found)
        content[name] = {**found.as_dict(), 'kind': run.kind, **run.facts}
        draw_gates(job.path(name, 'gates'), found)
        if run.folder is not None and (run.folder / FILE).is_file() and (rows := read_training(run.folder / FILE)):
            draw_training(job.path(name, 'over-training'), name, rows)
            content[name]['over_training'] = [without_channels(row) for row in rows]
        if any(site.groups for site in found.sites):
            draw_groups(job.path(name, 'by', found.grouped), found)
    draw_ratios(job.path('stripe-ratios'), measured)
    job.write('stripes', content)
    return '\n'.join(map(str, measured))


def without_channels(row: dict[str, Any]) -> dict[str, Any]:
    """Line of ``gates.jsonl`` without the means of single channels."""
    sites = {path: {k: v for k, v in site.items() if k != 'channel_means'} for path, site in row['sites'].items()}
    return {**row, 'sites': sites}


def correlation(job: Job) -> str:
    """Measure and draw how gates of a stage correlate, see `asr_downstream.folding.analysis.correlation`."""
    from asr_downstream.folding.analysis.figures.correlation import draw_correlations

    measured, content = [], {}
    for name, run in job.opened():
        found = find_correlations(name, run.model, run.data(), run.step)
        measured.append(found)
        content[name] = {**found.as_dict(), 'kind': run.kind, **run.facts}
    draw_correlations(job.path('correlation'), measured)
    job.write('correlation', content)
    return '\n'.join(map(str, measured))


def cost(job: Job, rounds: int = 30) -> str:
    """Measure and draw what attention costs, see `asr_downstream.folding.analysis.cost`.

    Args:
        job: what is analysed; the batch is the first of the data.
        rounds: of timing.
    """
    from asr_downstream.folding.analysis.figures.cost import draw_costs

    measured, content = [], {}
    for name, run in job.opened():
        found = measure_costs(name, run.model, next(iter(run.data())), run.step, rounds)
        measured.append(found)
        content[name] = {**found.as_dict(), 'kind': run.kind, **run.facts}
    draw_costs(job.path('cost'), measured)
    job.write('cost', content, rounds=rounds, threads=torch.get_num_threads())
    return '\n'.join(map(str, measured))


def noise(job: Job, kinds: Sequence[str] | None = None, fold: bool = False, seed: int = 0) -> str:
    """Sweep noise and draw what is left of the metric, see `asr_downstream.folding.analysis.noise`.

    Args:
        job: what is analysed.
        kinds: of noise; None: all that the runs have.
        fold: whether to measure a folded copy of each run beside it; gates that depend on the input become their mean.
        seed: of the noise.
    """
    from asr_downstream.folding.analysis.figures.noise import draw_growth, draw_noise

    found: list[NoiseCurves] = []
    grown: list[Growth] = []
    content = {}
    for name, run in job.opened():
        if run.metric is None or run.changed is None:
            raise AsrError(f'{name}: noise is for detectors and classifiers, and this is a run of kind {run.kind}')
        if found and found[0].metric != run.metric.name:
            raise AsrError(f'{name}: its metric is {run.metric.name}, and that of the first run {found[0].metric}')
        norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in run.model.modules())
        chosen = noise_kinds(kinds, True, run.attack is not None, norms)
        arms = {name: run.model}
        if fold and (copy := folded(run)) is not None:
            arms[f'{name}, folded'] = copy
        curves = sweep(arms, run.metric, chosen, run.changed, run.attack, seed=seed)
        found.append(curves)
        grown += growth_of(run, arms, seed) if GROWING in chosen else []
        growths = {growth.name: growth.as_dict() for growth in grown if growth.name in arms}
        content[name] = {**curves.as_dict(), 'growth': growths, 'kind': run.kind, **run.facts}
    together = NoiseCurves(found[0].metric, tuple(curve for curves in found for curve in curves.curves))
    draw_noise(job.path('noise'), together)
    if grown:
        draw_growth(job.path('noise-growth'), grown)
    job.write('noise', content, seed=seed)
    return '\n'.join(map(str, (together, *grown)))


def growth_of(run: OpenRun, arms: Mapping[str, nn.Module], seed: int) -> list[Growth]:
    """Growth of noise in the blocks of each model of a run; none where no block is known."""
    batch = next(iter(run.data()))
    strength = STRENGTHS[GROWING][0]
    assert run.changed is not None
    found = []
    for name, model in arms.items():
        noisy = run.changed(model, ImageNoise(GROWING, strength, seed))
        try:
            found.append(measure_growth(name, model, batch, run.step, noisy, f'{GROWING} {strength:g}'))
        except AsrError as error:
            print(error)
    return found


def folded(run: OpenRun) -> nn.Module | None:
    """Fold a copy of the model of a run; None: it has no plug."""
    sites = describe(run.model).sites
    if not sites:
        return None
    if all(site.folds for site in sites):
        return fold_exactly(run.model)[0]
    return fold_calibrated(run.model, run.data(), step=run.step)[0]
