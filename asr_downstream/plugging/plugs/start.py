"""`Start`: the affine of every site is multiplied by a number, once. No gates, no parameters, nothing to fold.

A sigmoid gate halves its branch at the start of a training. `Start` is that alone, and with ``value=0`` the start of
Goyal et al. (arXiv 1706.02677), where the last norm of each branch begins at zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from asr_downstream.console.text import some
from asr_downstream.errors import PlugError, warn
from asr_downstream.plugging.gating.gates import Gate
from asr_downstream.plugging.plugs.selection import Selection
from asr_downstream.plugging.save import starts
from asr_downstream.registry import PLUGS

__all__ = ['Start', 'check_starts', 'scale', 'scaled_again', 'warn_of_pretrained', 'warn_of_zeros']


@PLUGS.register_module()
class Start(Selection):
    """Weight and bias of the layer at every site times ``value``, when it is plugged; the layer stays the stock one.

    It scales the weights that are there: plug it once they are initialised or loaded, and before they are trained.
    Weights that are loaded later, such as a checkpoint to go on from, take their places as they are. Where the weights
    are zero, as in ResNets whose branches are built to start there, it changes nothing, and warns. It is for trainings
    from scratch: what pretrained branches have learnt to add would be scaled too.

    Args:
        value: at least 0.
        sites, skip: see `Selection`.
    """

    def __init__(self, value: float, sites: str | Sequence[str] = 'residual', skip: Sequence[str] = ()) -> None:
        super().__init__(sites, skip)
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0:
            raise PlugError(f'Start: value={value!r} should be a finite number of at least 0, such as 0.5')
        self.start = float(value)


def check_starts(paths: Sequence[str], scaled: Mapping[str, float], gates: Mapping[str, Sequence[Gate]]) -> None:
    """Refuse sites of a `Start` that cannot be scaled.

    Args:
        paths: of the sites.
        scaled: sites that are scaled already, path -> by what.
        gates: of the plugs before it in the list, by path.

    Raises:
        PlugError: a site is scaled already, or has gates.
    """
    for path in paths:
        if path in scaled:
            raise PlugError(
                f'{path}: is scaled by {scaled[path]:g} already, and would be scaled twice; leave one Start out, or '
                f'name other sites'
            )
        if path in gates:
            raise PlugError(f'{path}: Start scales the layer under the gates: put it first in the list, [Start, ASR]')


@torch.no_grad()
def scale(layer: Any, value: float) -> None:
    """Multiply weight and bias of a layer by ``value``, in place."""
    for tensor in affine(layer):
        tensor.mul_(value)


def warn_of_zeros(layers: Mapping[str, Any], values: Mapping[str, float]) -> None:
    """Warn where a `Start` changes nothing, since all that it scales is zero.

    Args:
        layers: at the sites, by path.
        values: of the `Start` at each of them; one of 0 has what it asks for.
    """
    zero = [path for path, value in values.items() if value and is_zero(layers[path])]
    if zero:
        start = ', '.join(f'Start({value:g})' for value in sorted({values[path] for path in zero}))
        warn(
            f'{start} changes nothing at {len(zero)} of {len(values)} sites: weight and bias are zero there: '
            f'{some(zero)}. Those branches start at zero already; to start them elsewhere, initialise the model '
            f'without that (ResNets of MMDetection: zero_init_residual=False), or leave the Start out'
        )


def warn_of_pretrained(values: Mapping[str, float]) -> None:
    """Warn of a `Start` that has scaled pretrained weights.

    Args:
        values: of the `Start` at each of these sites; none, and nothing is said.
    """
    if values:
        start = ', '.join(f'Start({value:g})' for value in sorted(set(values.values())))
        warn(
            f'{start} scales pretrained weights at {len(values)} sites: {some(list(values))}. What these branches have '
            f'learnt is scaled with them; it is for trainings from scratch. Leave it out; gates of a pretrained model '
            f'take preserve=True'
        )


def is_zero(layer: Any) -> bool:
    """Whether weight and bias of a layer hold nothing but zeros."""
    return not any(tensor.any() for tensor in affine(layer))


def affine(layer: Any) -> list[Tensor]:
    """Weight and bias of a layer, if it has one."""
    return [tensor for tensor in (layer.weight, layer.bias) if tensor is not None]


@contextmanager
def scaled_again(model: nn.Module) -> Iterator[None]:
    """Scale what is set anew inside the block, as initialisations do, by the `Start` that ``model`` was plugged with.

    What stays as it was is scaled already.
    """
    values = starts(model, inside=False)
    layers = {path: model.get_submodule(path) for path in values}
    before = {path: [tensor.detach().clone() for tensor in affine(layer)] for path, layer in layers.items()}
    yield
    with torch.no_grad():
        for path, layer in layers.items():
            for tensor, old in zip(affine(layer), before[path], strict=True):
                if not torch.equal(tensor, old.to(tensor)):
                    tensor.mul_(values[path])
    warn_of_zeros(layers, values)
