"""Correlation of gates: how alike the sites of a stage see an image.

Sites of one stage have one width, and their channels are those of one residual stream. For each image, and each pair of
them, Pearson's correlation of the two vectors of gates over the channels; then the mean over images (the DIA paper says
0.85 on average and not how it was taken, so the definition is ours).

A vector of equal gates has no correlation. Two such vectors that are the same count as 1; any other pair with one of
them is left out for that image. A pair that is left out for all images has none (NaN, null in JSON).

Independent gates of C channels do not correlate, yet their mean magnitude is about ``sqrt(2 / (pi C))``: it is given
beside the measured one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from asr_downstream.console.text import Printed
from asr_downstream.errors import AsrError
from asr_downstream.folding.analysis.gates import CONSTANT, Place, per_image, places_of, stream
from asr_downstream.folding.passes import Step, default_step

__all__ = ['Correlations', 'StageCorrelation', 'find_correlations', 'pearson']


@dataclass(frozen=True)
class StageCorrelation:
    """Correlations of the sites of one stage.

    Attributes:
        stage: its path.
        channels: width of its sites.
        sites: paths.
        unit: the attention that they all share; '' if they do not.
        matrix: mean correlation over images, ``(sites, sites)``; NaN where there is none.
        magnitude: mean magnitude over images and pairs.
        images: number of images; 1 where all gates are constant.
    """

    stage: str
    channels: int
    sites: tuple[str, ...]
    unit: str
    matrix: Tensor = field(repr=False)
    magnitude: float
    images: int

    @property
    def pairs(self) -> Tensor:
        """Correlations of all pairs that have one."""
        rows, columns = torch.triu_indices(len(self.sites), len(self.sites), 1)
        found = self.matrix[rows, columns]
        return found[found.isfinite()]

    @property
    def mean(self) -> float:
        """Mean over the pairs; NaN without any."""
        return float(self.pairs.mean())

    @property
    def chance(self) -> float:
        """Mean magnitude that independent gates would have."""
        return math.sqrt(2 / (math.pi * self.channels))


@dataclass(frozen=True, repr=False)
class Correlations(Printed):
    """Correlations of the gates of a model.

    Attributes:
        name: of the model.
        stages: those of at least two sites.
    """

    name: str
    stages: tuple[StageCorrelation, ...]

    @property
    def mean(self) -> float:
        """Mean over the pairs of all stages; NaN without any."""
        return float(torch.cat([stage.pairs for stage in self.stages]).mean())

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        stages = [
            {
                'stage': s.stage,
                'channels': s.channels,
                'sites': list(s.sites),
                'shared_unit': s.unit or None,
                'images': s.images,
                'mean': known(s.mean),
                'mean_magnitude': known(s.magnitude),
                'magnitude_of_independent': s.chance,
                'matrix': [[known(value) for value in row] for row in s.matrix.tolist()],
            }
            for s in self.stages
        ]
        return {'name': self.name, 'mean': known(self.mean), 'stages': stages}

    def parts(self) -> list[Table | str]:
        table = Table('stage', 'attention', title=f'{self.name}: correlation of gates, mean over pairs and images')
        for head in ('sites', 'channels', 'correlation', 'smallest', 'largest', 'magnitude', 'of independent gates'):
            table.add_column(head, justify='right')
        for s in self.stages:
            ends = [float(s.pairs.min()), float(s.pairs.max())] if len(s.pairs) else [math.nan] * 2
            numbers = [s.mean, *ends, s.magnitude, s.chance]
            cells = [str(len(s.sites)), str(s.channels), *(f'{n:.3f}' if math.isfinite(n) else 'none' for n in numbers)]
            table.add_row(s.stage, 'shared' if s.unit else 'own', *cells)
        return [table]


def known(value: float) -> float | None:
    """A number for JSON; None: there is none."""
    return float(f'{value:.6g}') if math.isfinite(value) else None


def find_correlations(
    name: str, model: nn.Module, data: Iterable[Any], step: Step = default_step, text: str | None = None
) -> Correlations:
    """Measure how the gates of the sites of each stage correlate.

    Args:
        name: of the model.
        model: plugged, or with attention of its own, in eval mode.
        data: batches.
        step: runs the model on a batch.
        text: what the progress line says.

    Raises:
        AsrError: no stage has two sites with gates, or see `asr_downstream.folding.analysis.gates.stream`.
    """
    places = places_of(model)
    sums: dict[tuple[str, ...], Sums] = {}
    for _, gates in stream(model, data, step, text or f'{name}: gates'):
        for stage in stages_of([places[path] for path in gates], gates):
            rows = [per_image(gates[path]) for path in stage]
            constant = all(places[path].kind == CONSTANT for path in stage)
            sums.setdefault(stage, Sums(len(stage))).add(rows, constant)
    if not sums:
        raise AsrError(f'{name}: no stage has two sites with gates, so nothing can correlate')
    found = []
    for paths, total in sums.items():
        units = {places[path].unit for path in paths}
        unit = next(iter(units)) if len(units) == 1 else ''
        matrix, magnitude = total.means()
        where = places[paths[0]].stage
        found.append(StageCorrelation(where, total.channels, paths, unit, matrix, magnitude, total.images))
    return Correlations(name, tuple(found))


def stages_of(places: Sequence[Place], gates: dict[str, list[Tensor]]) -> list[tuple[str, ...]]:
    """Paths of the sites of each stage that has two or more: of one parent and one width, one after another."""
    runs = groupby(places, key=lambda place: (place.stage, gates[place.path][0].shape[1]))
    stages = [tuple(place.path for place in run) for _, run in runs]
    return [stage for stage in stages if len(stage) > 1]


class Sums:
    """Sums of correlations over images.

    Args:
        sites: number of sites.
    """

    def __init__(self, sites: int) -> None:
        self.total = torch.zeros(sites, sites, dtype=torch.float64)
        self.magnitudes = torch.zeros(sites, sites, dtype=torch.float64)
        self.counts = torch.zeros(sites, sites, dtype=torch.float64)
        self.images = self.channels = 0

    def add(self, rows: Sequence[Tensor], constant: bool = False) -> None:
        """Add gates ``(B, C)`` of each site; constant ones are ``(1, C)``, and are of one image if all are constant."""
        count = max(len(r) for r in rows)
        if any(len(r) not in (1, count) for r in rows):
            return  # sites that see other numbers of samples
        found = pearson(torch.stack([r.expand(count, -1) for r in rows], 1)).cpu()
        some = found.isfinite()
        found = found.nan_to_num(0)
        self.total += found.sum(0)
        self.magnitudes += found.abs().sum(0)
        self.counts += some.sum(0)
        self.images = 1 if constant else self.images + count
        self.channels = rows[0].shape[1]

    def means(self) -> tuple[Tensor, float]:
        """Matrix of the mean correlations, and the mean magnitude over the pairs that have one."""
        pairs = torch.triu(self.counts, 1) > 0
        magnitude = self.magnitudes[pairs] / self.counts[pairs]
        return self.total / self.counts, float(magnitude.mean())


def pearson(gates: Tensor) -> Tensor:
    """Correlations over channels, ``(B, sites, C)`` -> ``(B, sites, sites)``; see the head of this file for NaN."""
    gates = gates.double()
    centred = gates - gates.mean(-1, keepdim=True)
    size = centred.norm(dim=-1, keepdim=True)
    # what is left of equal gates is rounding: of float32, as they mostly are computed in it
    flat = (gates.amax(-1) - gates.amin(-1)) <= 2 * torch.finfo(torch.float32).eps * gates.abs().amax(-1)
    unit = centred / size.where(~flat[..., None], torch.full_like(size, math.nan))
    found = unit @ unit.mT
    both = flat[..., :, None] & flat[..., None, :]
    same = (gates[..., :, None, 0] - gates[..., None, :, 0]).abs() <= 1e-6 * gates[..., :, None, 0].abs()
    return torch.where(both & same, torch.ones_like(found), found).clamp(-1, 1)
