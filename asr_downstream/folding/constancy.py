"""How constant the gates of a model are over real data.

The *stripe ratio* of a site is the standard deviation of its gates over the images, averaged over the channels, over
the standard deviation of their means over the channels: how far the gates move against how much they differ. Near 0,
the gates are the stripes of ASR (ECCV 2024, section 3) and constant for all purposes; a site above 1 does depend on its
input.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from asr_downstream.errors import FoldError
from asr_downstream.folding.passes import Step, default_step, passes
from asr_downstream.plugging.layers import Plugged
from asr_downstream.plugging.record import record

__all__ = ['Constancy', 'Moments', 'groups', 'measure_constancy']


@dataclass(frozen=True)
class Constancy:
    """How constant the gates of one site are over data.

    Attributes:
        path: of the site.
        group: of what folds together: the site, or the run of sites of a recurrent unit.
        mean: gates averaged over the samples, ``(C,)``, float64.
        over_samples: standard deviation over samples (images, and positions of spatial gates), mean over channels.
        over_channels: standard deviation of ``mean`` over channels.
        samples: number of samples.
    """

    path: str
    group: str
    mean: Tensor = field(repr=False)
    over_samples: float
    over_channels: float
    samples: int

    @property
    def ratio(self) -> float:
        """The stripe ratio; 0 for gates that do not move."""
        if self.over_samples == 0:
            return 0.0
        return self.over_samples / self.over_channels if self.over_channels else math.inf


@torch.no_grad()
def measure_constancy(
    model: nn.Module, data: Iterable[Any], step: Step = default_step, text: str = 'calibrating'
) -> list[Constancy]:
    """Run ``model`` over ``data``.

    Returns:
        The constancy of every site with input-dependent gates, least constant last.

    Raises:
        FoldError: no data, a site that no batch reaches, or gates that are not finite.
    """
    totals: dict[str, Moments] = {}
    with record(model) as seen:
        for _ in passes(model, data, step, text, FoldError, 'calibrate: '):
            for path, gates in seen.gates.items():
                for g in gates:
                    totals.setdefault(path, Moments()).add(g)
                gates.clear()
            for kept in (*seen.states.values(), *seen.inputs.values()):
                kept.clear()
    found = []
    for path, group in groups(model).items():
        if path not in totals:
            raise FoldError(f'{path}: was not reached by the calibration data; leave the site out, or use other data')
        found.append(totals[path].constancy(path, group))
    return sorted(found, key=lambda s: s.ratio)


class Moments:
    """Running mean and standard deviation of the gates of one site, in float64.

    They are taken of the differences from the first gates: gates that do not move have a deviation of exactly 0.

    Attributes:
        count: number of samples.
    """

    def __init__(self) -> None:
        self.count = 0
        self.origin = torch.zeros(())  # the first gates
        self.centre = torch.zeros(())  # mean of the differences from them
        self.squares = torch.zeros(())  # sum of the squares of the differences from the mean

    def add(self, gates: Tensor) -> None:
        """Add gates ``(B, C, *)``."""
        rows = gates.double().flatten(2).movedim(1, -1).flatten(0, -2) if gates.dim() > 2 else gates.double()
        if not len(rows):  # a head that had nothing to look at
            return
        if not self.count:
            self.origin = rows[0].clone()
            self.centre = self.squares = torch.zeros_like(self.origin)
        rows = rows - self.origin
        count, centre = len(rows), rows.mean(0)
        apart, whole = centre - self.centre, self.count + count
        own = (rows - centre).square().sum(0)
        self.squares = self.squares + own + apart.square() * (self.count * count / whole)
        self.centre = self.centre + apart * (count / whole)
        self.count = whole

    @property
    def mean(self) -> Tensor:
        """Mean over the samples, ``(C,)``."""
        return self.origin + self.centre

    @property
    def std(self) -> Tensor:
        """Standard deviation over the samples, ``(C,)``."""
        return (self.squares / max(1, self.count)).sqrt()

    def constancy(self, path: str, group: str) -> Constancy:
        """Finish.

        Raises:
            FoldError: the gates are not finite.
        """
        mean = self.mean
        if not mean.isfinite().all():
            raise FoldError(f'{path}: its gates are not finite on the calibration data; the training diverged')
        return Constancy(path, group, mean, float(self.std.mean()), float(mean.std(unbiased=False)), self.count)


def groups(model: nn.Module) -> dict[str, str]:
    """Path of each site with input-dependent gates -> what it folds with.

    Sites that share a recurrent state fold together: a site that is left would wait for the states of the others.
    """
    found: dict[str, str] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, Plugged) and layer.dynamic is not None:  # type: ignore[attr-defined]
            gates: Any = layer.dynamic  # type: ignore[attr-defined]
            found[path] = next((gate.site_attention.unit.name for gate in gates if gate.site_attention.recurrent), path)
    return found
