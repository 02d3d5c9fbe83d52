"""Trials of a fold: a part of the model with random gates in the place of a block, and in the weights of a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from asr_downstream.folding.native.blocks import Constant, put
from asr_downstream.folding.verify import tensors
from asr_downstream.modules.affine import NORMS, Constants, scaled
from asr_downstream.modules.copies import batch_of

__all__ = ['BAR', 'Sample', 'double', 'is_affine', 'sampled', 'stream', 'trial']

BAR = 1e-10  # largest relative difference of a fold that is right, in float64
TOLD_APART = 1e-6  # and how small it has to be beside the difference that gates make
STRETCH = (16.0, 4096.0)  # inputs that are noise of so many standard deviations: past the corners of ReLU6 and the like


@dataclass(frozen=True)
class Sample:
    """What a part of the model gives with random gates in the place of a block.

    Attributes:
        call: its arguments.
        outputs: all tensors that it returns.
        effect: relative difference that leaving the gates out makes.
    """

    call: Any
    outputs: list[Tensor]
    effect: float


def sampled(
    part: nn.Module, inner: str, constant: Constant, calls: list[Any]
) -> tuple[list[str], list[str], list[Sample] | str]:
    """Run a part with constants in the place of a block, and with nothing there, where it stays.

    Returns:
        Layers that ran before and after the block, in the order of running; and what came out, or why it is no use.
    """
    order: list[str] = []
    handles = []
    put(part, inner, constant)
    for name, module in part.named_modules():
        if name == inner or is_affine(module):
            handles.append(module.register_forward_hook(lambda *_, name=name: order.append(name)))
    real = double(calls)
    outputs = [run(part, call) for call in real]
    for handle in handles:
        handle.remove()
    if not all(apart(run(part, call), out) <= BAR for call, out in zip(real, outputs, strict=True)):
        return [], [], 'the part of the model around it computes something else each time, or nothing that is finite'
    wide = [stretched(call, factor) for call in real for factor in STRETCH]
    wide = [call for call in wide if all(bool(t.isfinite().all()) for t in run(part, call))]
    outputs += [run(part, call) for call in wide]
    put(part, inner, nn.Identity())
    effects = [apart(out, run(part, call)) for call, out in zip([*real, *wide], outputs, strict=True)]
    if not effects or not max(effects[: len(real)]) > BAR:
        return [], [], 'the outputs around it do not depend on it on the calibration data, so nothing can be tried'
    if inner not in order:
        return [], [], 'was not reached by the calibration data'
    first, last = order.index(inner), len(order) - order[::-1].index(inner)
    samples = [Sample(*found) for found in zip([*real, *wide], outputs, effects, strict=True) if found[2] > BAR]
    return order[:first], order[last:], samples


def trial(part: nn.Module, layer: nn.Module, constants: Constants, samples: Sequence[Sample]) -> float | None:
    """Put constants into a layer, compare, and take them out again.

    Returns:
        The largest relative difference; None: it is more than rounding.
    """
    weight, bias = scaled(layer, constants)
    new = {'weight': weight} if bias is None else {'weight': weight, 'bias': bias}
    old = {name: layer._parameters[name].detach().clone() for name in new}  # type: ignore[union-attr]
    try:
        for name, value in new.items():
            layer._parameters[name].copy_(value)  # type: ignore[union-attr]
        worst = 0.0
        for sample in samples:
            error = apart(sample.outputs, run(part, sample.call))
            if not error <= min(BAR, TOLD_APART * sample.effect):
                return None
            worst = max(worst, error)
        return worst
    finally:
        for name, value in old.items():
            layer._parameters[name].copy_(value)  # type: ignore[union-attr]


def is_affine(module: nn.Module) -> bool:
    """Whether a module is a norm with a weight, a convolution or a linear layer."""
    kinds = (*NORMS, nn.modules.conv._ConvNd, nn.Linear)
    return isinstance(module, kinds) and module._parameters.get('weight') is not None


def double(value: Any) -> Any:
    """Nested values with all tensors of floating point in float64."""
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, value)


def stretched(value: Any, factor: float) -> Any:
    """Nested values with noise in the place of tensors of floating point, ``factor`` times as wide as they are."""

    def noise(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() < 2:
            return x
        return x.mean() + factor * x.std() * torch.randn(x.shape, dtype=x.dtype, generator=stream()).to(x.device)

    return tree_map(noise, value)


def stream() -> torch.Generator:
    """Random numbers of a trial, which are no business of the user's."""
    return torch.Generator().manual_seed(0)


def run(part: nn.Module, call: Any) -> list[Tensor]:
    """All tensors that a part returns; it may change its arguments, so it gets copies."""
    args, kwargs = batch_of(call)
    return [t.detach().clone() for _, t in tensors(part(*args, **kwargs))]


def apart(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Largest difference of two runs, relative to the largest number of each output; NaN: they cannot be compared."""
    if [t.shape for t in ours] != [t.shape for t in theirs] or not ours:
        return float('nan')
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if not a.numel():
            continue
        a, b = a.to(torch.complex128 if a.is_complex() else torch.float64), b
        difference, scale = float((a - b).abs().max()), float(a.abs().max())
        found = difference / scale if difference and scale else difference
        if math.isnan(found):
            return found
        worst = max(worst, found)
    return worst
