"""Stripes: how little the gates of a site depend on the image, and what the model loses if they do not at all.

A heat map of gates, images by channels, shows stripes where each channel has a value of its own, and the same in every
image (ASR, ECCV 2024). In numbers: the standard deviation of each channel over images; the *stripe ratio*, its mean
over the channels over the standard deviation of the channels' means; the *relative deviation*, the mean over the
channels of deviation over mean. Near 0 the gates are constant for all purposes. The functional test says what that
means for the model: its metric after every gate was replaced by its mean over images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from asr_downstream.console.text import Printed
from asr_downstream.errors import FoldError
from asr_downstream.folding.analysis.gates import INPUT, NATIVE, By, SiteGates, collect
from asr_downstream.folding.calibrated import change_of, settle, with_means
from asr_downstream.folding.native.blocks import with_constants
from asr_downstream.folding.passes import Step, default_step
from asr_downstream.modules.copies import copy_of

__all__ = ['Functional', 'Metric', 'Stripes', 'find_stripes', 'with_mean_gates']


class Metric(NamedTuple):
    """A number of a model.

    Attributes:
        name: such as ``'AP'``.
        measure: gives it.
        larger: whether larger is better.
    """

    name: str
    measure: Callable[[nn.Module], float]
    larger: bool = True


class Functional(NamedTuple):
    """What a model loses if its gates are replaced by their mean over images.

    Attributes:
        replaced: number of sites whose gates depended on the input.
        change: of the outputs, root mean square over that of the outputs.
        metric: name; '' if none was measured.
        before, after: the metric.
    """

    replaced: int
    change: float
    metric: str = ''
    before: float | None = None
    after: float | None = None


@dataclass(frozen=True, repr=False)
class Stripes(Printed):
    """Gates of a model over images.

    Attributes:
        name: of the model.
        sites: in the order of ``named_modules()``.
        test: the functional test; None where no gate depends on the input.
        grouped: what the images are grouped by, such as ``'timestep'``; '' if by nothing.
    """

    name: str
    sites: tuple[SiteGates, ...]
    test: Functional | None = None
    grouped: str = ''

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            'name': self.name,
            'functional_test': None if self.test is None else self.test._asdict(),
            'grouped_by': self.grouped or None,
            'sites': [site_dict(site) for site in self.sites],
        }

    def parts(self) -> list[Table | str]:
        table = Table('site', 'gates', title=f'{self.name}: gates over images')
        explained = any(site.groups for site in self.sites)
        heads = ['channels', 'mean', 'std over images', 'std over channels', 'stripe ratio', 'relative deviation']
        for head in [*heads, *[f'due to {self.grouped}'] * explained]:
            table.add_column(head, justify='right')
        for site in self.sites:
            found = site.constancy
            numbers = [float(site.mean.mean()), found.over_samples, found.over_channels, found.ratio, relative(site)]
            cells = [str(len(site.mean)), *(f'{n:.4f}' for n in numbers)]
            part = site.explained
            share = [] if not explained else ['' if part is None else f'{part:.0%}']
            table.add_row(site.place.path, site.place.kind, *cells, *share)
        return [table, *([] if self.test is None else [sentence(self.test)])]


def sentence(test: Functional) -> str:
    """The functional test, in a line."""
    line = (
        f'gates of {test.replaced} sites replaced by their mean: outputs change by {test.change:.2%} (root mean square)'
    )
    if test.before is None or test.after is None:
        return line
    return f'{line}; {test.metric} {test.before:.4f} before, {test.after:.4f} after'


def relative(site: SiteGates) -> float:
    """Deviation over samples over the mean, mean over the channels whose mean is not 0."""
    some = site.mean != 0
    return float((site.std[some] / site.mean[some].abs()).mean()) if some.any() else 0.0


def site_dict(site: SiteGates) -> dict[str, Any]:
    """Plain data of a site."""
    found, place = site.constancy, site.place
    return {
        'path': place.path,
        'stage': place.stage,
        'gates': place.kind,
        'shared_unit': place.unit or None,
        'channels': len(site.mean),
        'samples': site.samples,
        'stripe_ratio': found.ratio if math.isfinite(found.ratio) else None,
        'relative_deviation': relative(site),
        'over_samples': found.over_samples,
        'over_channels': found.over_channels,
        'explained_by_group': site.explained,
        'channel_means': rounded(site.mean),
        'channel_deviations': rounded(site.std),
        'groups': [
            {
                'value': g.value,
                'samples': g.samples,
                'mean': float(g.mean.mean()),
                'over_samples': float(g.std.mean()),
                'channel_means': rounded(g.mean),
            }
            for g in site.groups
        ],
    }


def rounded(values: Tensor) -> list[float]:
    """Numbers with six digits."""
    return [float(f'{value:.6g}') for value in values.tolist()]


def with_mean_gates(model: nn.Module, sites: Sequence[SiteGates]) -> nn.Module:
    """Copy a model with the mean gates in the place of those that depend on the input; nothing is folded."""
    found = with_means(model, [site.constancy for site in sites if site.place.kind == INPUT])
    settle(found)
    natives = [site.constancy for site in sites if site.place.kind == NATIVE]
    return with_constants(found, natives) if natives else found


def find_stripes(
    name: str,
    model: nn.Module,
    data: Iterable[Any],
    step: Step = default_step,
    metric: Metric | None = None,
    by: By | None = None,
    grouped: str = '',
    keep: int = 64,
) -> Stripes:
    """Measure the gates of a model over data, and what their dependence on the input is worth.

    Args:
        name: of the model.
        model: plugged, or with attention of its own, in eval mode; it is not changed.
        data: batches, read twice.
        step: runs the model on a batch.
        metric: of the functional test; None: only the change of the outputs is measured.
        by: see `asr_downstream.folding.analysis.gates.collect`.
        grouped: what ``by`` gives.
        keep: about how many images are kept for the heat map.

    Raises:
        AsrError: see `asr_downstream.folding.analysis.gates.collect`.
        FoldError: outputs of other shapes after the replacement; let ``step`` return feature maps.
    """
    sites = tuple(collect(model, data, step, by, keep, f'{name}: gates'))
    moving = [site for site in sites if site.place.kind in (INPUT, NATIVE)]
    test = functional(model, moving, data, step, metric) if moving else None
    return Stripes(name, sites, test, grouped if by is not None else '')


@torch.no_grad()
def functional(
    model: nn.Module, moving: Sequence[SiteGates], data: Iterable[Any], step: Step, metric: Metric | None
) -> Functional:
    """Replace the gates by their means, and measure."""
    replaced = with_mean_gates(copy_of(model, FoldError), moving)
    change = change_of(model, replaced, data, step)
    if metric is None:
        return Functional(len(moving), change)
    before, after = float(metric.measure(model)), float(metric.measure(replaced))
    return Functional(len(moving), change, metric.name, before, after)
