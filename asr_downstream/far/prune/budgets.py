"""Pruning to a budget: units, parameters or latency, by one threshold for the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asr_downstream.errors import AsrError
from asr_downstream.far.model.describe import check_replaced
from asr_downstream.far.prune.scores import Groups, scores, shrink, smallest_within
from asr_downstream.measure import cost
from asr_downstream.measure.timing import paired_times, ratio

__all__ = ['Budget', 'cut', 'forward', 'time_ratio']

LATENCY_ROUNDS = 15


@dataclass(frozen=True)
class Budget:
    """What a pruned model may cost.

    Attributes:
        kind: ``'units'`` (share of the hidden units), ``'parameters'`` (of the whole model; up to 1: share),
            ``'latency'`` (share of the time of a forward) or ``'threshold'`` (the threshold itself).
        value: the bound.
    """

    kind: str
    value: float

    KINDS = ('units', 'parameters', 'latency', 'threshold')

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise AsrError(f'budget: {self.kind}={self.value!r} should be a number')
        if self.kind not in self.KINDS or not self.value > 0:
            raise AsrError(f'budget: {self.kind}={self.value} should be one of {", ".join(self.KINDS)}, greater than 0')
        if self.kind in ('units', 'latency') and self.value > 1:
            raise AsrError(f'budget: {self.kind}={self.value} should be a share, at most 1')

    @property
    def name(self) -> str:
        """Name of the member: FAR-50 has half of the hidden units."""
        share = self.value <= 1 and self.kind != 'threshold'
        number = f'{100 * self.value:g}' if share else f'{self.value:.0f}' if self.value > 1 else f'{self.value:g}'
        return f'FAR-{number}' if self.kind == 'units' else f'FAR-{self.kind}-{number}'


def cut(model: nn.Module, budget: Budget, example: dict[str, Any] | None = None, relative: bool = True) -> float:
    """Remove the units with the smallest norms until ``model`` is within a budget, in place.

    Args:
        model: with replaced attentions.
        budget: what it may cost.
        example: arguments of a forward, on the device of the model, for latency.
        relative: whether norms are compared relative to the largest of their head and direction; then each direction
            keeps at least one unit.

    Returns:
        The threshold.

    Raises:
        AsrError: the budget cannot be met, or nothing is replaced here.
    """
    check_replaced(model)
    found = scores(model, relative)
    if budget.kind == 'threshold':
        if relative and budget.value > 1:
            raise AsrError(f'budget: threshold={budget.value:g} is of relative norms, which are at most 1')
        shrink(model, {unit: values >= budget.value for unit, values in found.items()})
        return budget.value
    every = sum(values.numel() for values in found.values())
    whole = cost.parameters(model)

    def price(kept: Groups) -> float:
        units = sum(int(stay.sum()) for stay in kept.values())
        if budget.kind == 'units' or (budget.kind == 'latency' and units == every):
            return units / every
        smaller = copy.deepcopy(model)
        shrink(smaller, kept)
        if budget.kind == 'parameters':
            return cost.parameters(smaller) / (whole if budget.value <= 1 else 1)
        return time_ratio(smaller, model, example or {})

    threshold, kept = smallest_within(found, price, budget.value)
    shrink(model, kept)
    return threshold


def time_ratio(model: nn.Module, whole: nn.Module, example: dict[str, Any]) -> float:
    """Median time of a forward of ``model`` over that of ``whole``, in paired rounds."""
    calls = {name: forward(m, example) for name, m in {'model': model, 'whole': whole}.items()}
    modes = model.training, whole.training
    model.eval(), whole.eval()
    times = paired_times(calls, LATENCY_ROUNDS, 'timing', threads=torch.get_num_threads())
    model.train(modes[0]), whole.train(modes[1])
    return ratio(times['model'], times['whole']).median


def forward(model: nn.Module, inputs: dict[str, Any]) -> Callable[[], Any]:
    """A forward without gradients, for timing; waits for the accelerator."""

    def call() -> Any:
        with torch.inference_mode():
            out = model(**inputs)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return out

    return call
