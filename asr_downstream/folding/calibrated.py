"""Calibrated folding: gates that depend on the input are replaced by their mean over real data, and then fold.

How much that costs is measured, not assumed: how constant each gate was (`asr_downstream.folding.constancy`), the
change of the outputs, and of a metric.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from asr_downstream.console.progress import bar
from asr_downstream.errors import FoldError, warn
from asr_downstream.folding.constancy import Constancy, groups, measure_constancy
from asr_downstream.folding.exact import Comparison, check_mode, comparison, fold_gates
from asr_downstream.folding.passes import Step, default_step
from asr_downstream.folding.report import Calibration, FoldReport, Trial
from asr_downstream.folding.verify import Verification, tensors
from asr_downstream.modules.check import check_bare, check_module
from asr_downstream.modules.copies import batch_of, copy_of
from asr_downstream.plugging.describe import check_connected
from asr_downstream.plugging.gating.gates import ConstantGate, Gate
from asr_downstream.plugging.layers import Plugged

__all__ = ['Metric', 'check_arguments', 'check_repeatable', 'fold_calibrated', 'within_budget']

Metric: TypeAlias = Callable[[nn.Module], float]


def fold_calibrated(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    step: Step | None = None,
    refine_norms: bool = False,
    metric: Metric | None = None,
    max_drop: float | None = None,
    check: Any = None,
) -> tuple[nn.Module, FoldReport]:
    """Replace gates that depend on the input by their mean over data, and fold them like constant ones.

    ``fold(model, calibrate=batches, ...)`` is the short form of this.

    Args:
        model: a plugged model in eval mode; it is not changed.
        batches: to average the gates over: a list or a loader, read more than once, on the model's device.
        step: how to run a batch, ``step(model, batch)``; its outputs are compared before and after. The default calls
            the model with a tensor, a tuple of arguments or a dict of keyword arguments.
        refine_norms: estimate the running statistics of all batch norms again, over the same data.
        metric: of a model, larger is better; measured before and after.
        max_drop: how much may be lost at most: of ``metric``, or without one the relative change of the outputs (root
            mean square). The least constant sites stay unfolded until it holds; sites of one recurrent unit go
            together.
        check: batches; the model with means in the place of gates and the folded one are compared on them.

    Returns:
        The folded copy, and a report whose ``calibration`` says how constant the gates were, how much the outputs and
        the metric have changed, and which sites ``max_drop`` has kept.

    Raises:
        FoldError: see `asr_downstream.fold`; or batches that do not fit the model or do not reach a site, outputs of
            other shapes after folding, or a metric that is not finite.
    """
    check_module(model, 'fold_calibrated', FoldError)
    compare = comparison(check, step)
    against = None if compare is None else partial(compare_settled, compare)
    check_bare(model, FoldError)
    check_arguments(batches, step, refine_norms, metric, max_drop)
    check_connected(model)
    check_mode(model)
    if not groups(model):
        if refine_norms or metric is not None or max_drop is not None:
            warn('all gates are constant and fold exactly: refine_norms, metric and max_drop are not used')
        return fold_gates(model, against=against)
    finish = partial(fold_gates, dynamic='keep', against=against)
    folded, report, found = calibrate(model, batches, finish, step, refine_norms, metric, max_drop)
    return folded, replace(report, calibration=found)


def compare_settled(compare: Comparison, plugged: nn.Module, folded: nn.Module) -> Verification:
    """Compare a model that has means in the place of gates with the folded one."""
    settle(plugged)
    return compare(plugged, folded)


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
    """Round means to the precision of their layers, in place: they are float64 to fold exactly, a forward needs one."""
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

    See `within_budget` and `asr_downstream.fold`.
    """
    check_repeatable(data)
    step = step or default_step
    sites = measure_constancy(model, data, step)

    def make(chosen: list[Constancy]) -> tuple[nn.Module, Any]:
        return finish(with_means(model, chosen))

    return within_budget(model, data, sites, make, step, refine_norms, metric, max_drop)


def check_repeatable(data: Iterable[Any]) -> None:
    """Refuse an iterator, which can be read only once.

    Raises:
        FoldError: it is one.
    """
    if iter(data) is data:
        raise FoldError('calibrate: the data is read more than once; give a list or a DataLoader, not an iterator')


def within_budget(
    model: nn.Module,
    data: Iterable[Any],
    sites: list[Constancy],
    make: Callable[[list[Constancy]], tuple[nn.Module, Any]],
    step: Step,
    refine_norms: bool = False,
    metric: Metric | None = None,
    max_drop: float | None = None,
) -> tuple[nn.Module, Any, Calibration]:
    """Fold as many sites as ``max_drop`` lets, the most constant first.

    The number of groups to leave, the least constant first, is found by bisection.

    Args:
        model: the model as it is.
        data: to compare the outputs on.
        sites: what can be folded.
        make: folds these sites of the model; returns the folded model first.
        step: this and the rest as in `fold_calibrated`.
        refine_norms: estimate the running statistics of all batch norms again.
        metric: of a model, larger is better.
        max_drop: how much may be lost at most.

    Returns:
        What ``make`` returned, the folded model first, and what was measured.
    """
    worst: dict[str, float] = {}  # groups by their least constant site
    for site in sites:
        worst[site.group] = max(site.ratio, worst.get(site.group, 0.0))
    order = sorted(worst, key=lambda group: worst[group], reverse=True)
    metric_before = None if metric is None else finite(metric(model))
    trials: dict[int, tuple[nn.Module, Any, Trial]] = {}

    def attempt(kept: int) -> Trial:
        if kept not in trials:
            left = set(order[:kept])
            folded, report = make([s for s in sites if s.group not in left])
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
