"""Pruning to a budget: units, parameters or latency, by one threshold for the whole model."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from asr_downstream import cost
from asr_downstream.errors import AsrError
from asr_downstream.far.pruning import Groups, scores, shrink, smallest_within

__all__ = ['Budget', 'cut', 'forward_time']

LATENCY_ROUNDS = 7


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
        if self.kind not in self.KINDS or not self.value > 0:
            raise AsrError(f'budget: {self.kind}={self.value} should be one of {", ".join(self.KINDS)}, greater than 0')
        if self.kind in ('units', 'latency') and self.value > 1:
            raise AsrError(f'budget: {self.kind}={self.value} should be a share, at most 1')

    @property
    def name(self) -> str:
        """Name of the member: FAR-50 has half of the hidden units."""
        number = f'{100 * self.value:g}' if self.value <= 1 and self.kind != 'threshold' else f'{self.value:g}'
        return f'FAR-{number}' if self.kind == 'units' else f'FAR-{self.kind}-{number}'


def cut(model: nn.Module, budget: Budget, example: dict[str, Any] | None = None, relative: bool = True) -> float:
    """Remove the units with the smallest norms until ``model`` is within a budget, in place.

    Args:
        model: with replaced attentions.
        budget: what it may cost.
        example: arguments of a forward, for latency.
        relative: whether norms are compared relative to the largest of their head and direction.

    Returns:
        The threshold.

    Raises:
        AsrError: the budget cannot be met.
    """
    found = scores(model, relative)
    if budget.kind == 'threshold':
        shrink(model, {unit: values >= budget.value for unit, values in found.items()})
        return budget.value
    every = sum(values.numel() for values in found.values())
    whole = cost.parameters(model)
    example = example or {}
    reference = forward_time(model, example) if budget.kind == 'latency' else 0.0

    def price(kept: Groups) -> float:
        if budget.kind == 'units':
            return sum(int(stay.sum()) for stay in kept.values()) / every
        smaller = copy.deepcopy(model)
        shrink(smaller, kept)
        if budget.kind == 'parameters':
            return cost.parameters(smaller) / (whole if budget.value <= 1 else 1)
        return forward_time(smaller, example) / reference

    threshold, kept = smallest_within(found, price, budget.value)
    shrink(model, kept)
    return threshold


@torch.inference_mode()
def forward_time(model: nn.Module, example: dict[str, Any]) -> float:
    """Median seconds of a forward."""
    model.eval()
    seconds = []
    for _ in range(LATENCY_ROUNDS + 2):
        begin = time.perf_counter()
        model(**example)
        seconds.append(time.perf_counter() - begin)
    return median(seconds[2:])
