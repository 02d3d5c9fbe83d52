"""Calibrated folding: gates that depend on the input are replaced by their mean over real data, and then fold.

How much that costs is measured, not assumed: how constant each gate was (`asr_downstream.folding.constancy`), the
change of the outputs, and of a metric.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from rich.table import Table
from torch import Tensor, nn

from asr_downstream.console.progress import bar
from asr_downstream.console.text import render
from asr_downstream.errors import FoldError
from asr_downstream.folding.constancy import Constancy, Step, default_step, measure_constancy
from asr_downstream.folding.verify import tensors
from asr_downstream.modules.copies import batch_of, copy_of
from asr_downstream.plugging.gates import ConstantGate, Gate
from asr_downstream.plugging.layers import Plugged

__all__ = ['Calibration', 'Metric', 'Trial', 'calibrate']

Metric: TypeAlias = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Trial:
    """One number of groups left unfolded, and what it costs.

    Attributes:
        kept: number of groups that stay as they are.
        change: of the outputs, root mean square over that of the outputs.
        metric: of the folded model, if one was given.
        drop: what is held against ``max_drop``.
    """

    kept: int
    change: float
    metric: float | None
    drop: float


@dataclass(frozen=True)
class Calibration:
    """What calibrated folding measured.

    Attributes:
        sites: constancy of every site with input-dependent gates, least constant last.
        kept: paths of the sites that stay unfolded.
        trials: what was tried, the one taken last.
        metric_before: of the model as it was, if a metric was given.
        refined: batch norm statistics were estimated again.
    """

    sites: tuple[Constancy, ...]
    kept: tuple[str, ...]
    trials: tuple[Trial, ...]
    metric_before: float | None = None
    refined: bool = False

    @property
    def change(self) -> float:
        """Relative change of the outputs of the folded model."""
        return self.trials[-1].change

    @property
    def metric_after(self) -> float | None:
        """Metric of the folded model."""
        return self.trials[-1].metric

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            'sites': [
                {
                    'path': s.path,
                    'over_samples': s.over_samples,
                    'over_channels': s.over_channels,
                    'stripe_ratio': s.ratio,
                    'samples': s.samples,
                    'folded': s.path not in self.kept,
                }
                for s in self.sites
            ],
            'trials': [vars(t) for t in self.trials],
            'metric_before': self.metric_before,
            'metric_after': self.metric_after,
            'output_change': self.change,
            'batch_norms_refined': self.refined,
        }

    def __str__(self) -> str:
        table = Table(
            'site', 'std over samples', 'std over channels', 'stripe ratio', '', title='constancy of the gates'
        )
        for s in self.sites:
            numbers = (f'{v:.4f}' for v in (s.over_samples, s.over_channels, s.ratio))
            table.add_row(s.path, *numbers, 'kept' if s.path in self.kept else 'folded')
        lines = [render(table), f'outputs change by {self.change:.2%} (root mean square)']
        if self.metric_before is not None:
            lines.append(f'metric: {self.metric_before:.4f} before, {self.metric_after:.4f} after')
        if self.kept:
            lines.append(f'kept unfolded, within the budget: {", ".join(self.kept)}')
        return '\n'.join(lines)


class Fixed(nn.Module):
    """An attention that always gives the same gates ``(1, C)``."""

    uses_input = False

    def __init__(self, gates: Tensor, confined: bool) -> None:
        super().__init__()
        self.confined = confined
        self.register_buffer('gates', gates[None])

    def forward(self, x: Tensor) -> Tensor:
        """Return the gates."""
        return self.gates  # type: ignore[return-value]


def with_means(model: nn.Module, sites: Iterable[Constancy]) -> nn.Module:
    """Copy ``model`` with constant gates, the means, at ``sites``."""
    model = copy_of(model, FoldError)
    for site in sites:
        layer: Any = model.get_submodule(site.path)
        mean = site.mean.to(layer.weight.device)
        relative = any(gate.reference is not None for gate in layer.dynamic)
        gate = ConstantGate(Fixed(mean, all(g.confined for g in layer.dynamic) and not relative), len(mean))
        if relative:  # the mean is of gates that were divided by their first ones
            gate.reference = torch.ones_like(mean)[None]
        layer.gate = nn.ModuleList([*(layer.gate or ()), gate.eval()])
        layer.dynamic = None
    return model


def settle(model: nn.Module) -> None:
    """Give means the precision of their layers, in place: folding wants them exact, a forward wants one precision."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, Plugged)]
    for layer in layers:
        for gate in layer.gate or ():
            if isinstance(gate.attention, Fixed):
                gate.to(layer.weight.dtype)


@torch.no_grad()
def change_of(model: nn.Module, folded: nn.Module, data: Iterable[Any], step: Step) -> float:
    """Root mean square of the change of the outputs, over that of the outputs before; both on the same batches."""
    apart = size = 0.0
    for batch in bar(data, 'comparing'):
        old, new = ([t.double() for _, t in tensors(step(m, batch_of(batch)))] for m in (model, folded))
        if [t.shape for t in old] != [t.shape for t in new]:
            raise FoldError(
                'calibrate: the outputs have other shapes after folding; let step= return tensors of fixed shapes, '
                'such as feature maps'
            )
        apart += sum(float((b - a).square().sum()) for a, b in zip(old, new, strict=True))
        size += sum(float(a.square().sum()) for a in old)
    change = math.sqrt(apart / size) if size else (0.0 if apart == 0 else math.inf)
    if math.isnan(change):
        raise FoldError('calibrate: the outputs are not finite; let step= return others, such as feature maps')
    return change


@torch.no_grad()
def refine(model: nn.Module, data: Iterable[Any], step: Step) -> None:
    """Estimate the running statistics of the batch norms again, in place; all else stays in eval.

    They average over all batches, whatever their momentum. Norms that ``step`` does not reach, and those of gates that
    are still plugged, keep what they have.
    """
    gates = {id(m) for gate in model.modules() if isinstance(gate, Gate) for m in gate.modules()}
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None and id(m) not in gates
    ]
    before = [(m.momentum, {k: v.clone() for k, v in m.named_buffers(recurse=False)}) for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.training = True
    try:
        for batch in bar(data, 'batch norms'):
            step(model, batch_of(batch))
    finally:
        for norm, (momentum, buffers) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.training = False
            if not norm.num_batches_tracked:
                for name, value in buffers.items():
                    norm.get_buffer(name).copy_(value)


def finite(value: Any) -> float:
    """Return a metric as a float.

    Raises:
        FoldError: it is no number.
    """
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise FoldError(f'calibrate: the metric is {value!r}, which is no number') from error
    if not math.isfinite(number):
        raise FoldError(f'calibrate: the metric is {number}, and nothing can be compared with that')
    return number


def check_arguments(calibrate: Any, step: Any, refine_norms: Any, metric: Any, max_drop: Any) -> None:
    """Refuse arguments of `asr_downstream.fold` that mean nothing.

    Raises:
        FoldError: see above.
    """
    if isinstance(calibrate, Tensor):
        raise FoldError('calibrate: a tensor is one batch; give a list of batches, [x]')
    if not isinstance(calibrate, Iterable) or isinstance(calibrate, str | bytes):
        raise FoldError(f'calibrate={calibrate!r} should be a list or a loader of batches')
    for name, function in (('step', step), ('metric', metric)):
        if function is not None and not callable(function):
            raise FoldError(f'{name}={function!r} should be a function')
    if not isinstance(refine_norms, bool):
        raise FoldError(f'refine_norms={refine_norms!r} should be True or False')
    number = isinstance(max_drop, int | float) and not isinstance(max_drop, bool)
    if max_drop is not None and (not number or math.isnan(max_drop)):
        raise FoldError(f'max_drop={max_drop!r} should be a number')


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    finish: Callable[[nn.Module], tuple[nn.Module, Any]],
    step: Step | None = None,
    refine_norms: bool = False,
    metric: Metric | None = None,
    max_drop: float | None = None,
) -> tuple[nn.Module, Any, Calibration]:
    """Replace gates by their means and ``finish`` (fold) the copy; leave as few groups as ``max_drop`` asks for.

    The number of groups to leave, the least constant first, is found by bisection. See `asr_downstream.fold`.

    Returns:
        What ``finish`` returned, the folded model first, and what was measured.
    """
    if iter(data) is data:
        raise FoldError('calibrate: the data is read more than once; give a list or a DataLoader, not an iterator')
    step = step or default_step
    sites = measure_constancy(model, data, step)
    worst: dict[str, float] = {}  # groups by their least constant site
    for site in sites:
        worst[site.group] = max(site.ratio, worst.get(site.group, 0.0))
    order = sorted(worst, key=lambda group: worst[group], reverse=True)
    metric_before = None if metric is None else finite(metric(model))
    trials: dict[int, tuple[nn.Module, Any, Trial]] = {}

    def attempt(kept: int) -> Trial:
        if kept not in trials:
            left = set(order[:kept])
            folded, report = finish(with_means(model, [s for s in sites if s.group not in left]))
            if refine_norms and kept < len(order):
                refine(folded, data, step)
            change = change_of(model, folded, data, step)
            value = None if metric is None else finite(metric(folded))
            drop = change if metric_before is None or value is None else metric_before - value
            trials[kept] = folded, report, Trial(kept, change, value, drop)
        return trials[kept][2]

    taken = 0
    if attempt(0).drop > (math.inf if max_drop is None else max_drop):
        low, taken = 0, len(order)  # low is too few, taken is enough: nothing folded, nothing dropped
        while taken - low > 1:
            middle = (low + taken) // 2
            low, taken = (middle, taken) if attempt(middle).drop > max_drop else (low, middle)  # type: ignore[operator]
        attempt(taken)
    folded, report, last = trials.pop(taken)
    left = set(order[:taken])
    return (
        folded,
        report,
        Calibration(
            sites=tuple(sites),
            kept=tuple(s.path for s in sites if s.group in left),
            trials=(*(trial for *_, trial in trials.values()), last),
            metric_before=metric_before,
            refined=refine_norms and taken < len(order),
        ),
    )
