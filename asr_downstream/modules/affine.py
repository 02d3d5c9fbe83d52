"""The arithmetic of folding: weight and bias of a stock layer with constants of its channels put into them.

    y v + s of y = layer(x)     output side: rows of the weight times v; bias times v, plus s
    layer(x u)                  input side: columns of the weight times u; the bias stays

This is the one place where folded weights are computed, of plugged layers and of stock ones. Nothing is rounded here:
float32 weights times float64 constants are float64, and who stores them rounds, once.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

__all__ = [
    'Constants',
    'input_channels',
    'normalises',
    'output_channels',
    'scaled',
    'scaled_columns',
    'scaled_rows',
    'scaled_weight',
]

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


class Constants(NamedTuple):
    """What is put into a layer; in float64 the folded weights are exact up to one rounding.

    Attributes:
        gate: scales of its outputs, ``(C_out,)``; None: 1.
        shift: what is added to its outputs after that, ``(C_out,)``; None: 0.
        inputs: scales of its inputs, ``(C_in,)``; None: 1.
    """

    gate: Tensor | None = None
    shift: Tensor | None = None
    inputs: Tensor | None = None


def scaled(layer: nn.Module, constants: Constants) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of ``layer`` with ``constants`` in them, not rounded; the layer is not changed.

    Args:
        layer: a norm with an affine, a convolution, transposed or not, or a linear layer; also a subclass, plugged or
            not, that computes the same of its weight and bias.
        constants: of this layer, on its device.

    Returns:
        The weight, and the bias or None. What no constant changes is the parameter itself.

    Raises:
        ValueError: constants of another number of channels, a shift without a bias, or scaled inputs of a norm.
    """
    gate, shift, inputs = constants
    weight: Tensor = layer.weight  # type: ignore[assignment]
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    for value, side in ((gate, 'outputs'), (shift, 'outputs'), (inputs, 'inputs')):
        channels = 0 if value is None else (input_channels if side == 'inputs' else output_channels)(layer)
        if value is not None and value.shape != (channels,):
            raise ValueError(
                f'{type(layer).__name__} has {channels} {side}, and there are constants of shape {tuple(value.shape)}'
            )
    if shift is not None and bias is None:
        raise ValueError(f'{type(layer).__name__} has no bias, so there is nothing that a shift could be added to')
    if bias is not None:  # in two operators: both roundings are those of every machine
        bias = bias if gate is None else bias * gate
        bias = bias if shift is None else bias + shift
    return scaled_weight(layer, weight, gate, inputs), bias


def normalises(layer: nn.Module) -> bool:
    """Whether a scale of its inputs is gone after this layer."""
    return isinstance(layer, NORMS)


def output_channels(layer: nn.Module) -> int:
    """Number of output channels of a layer."""
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return layer.out_channels
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if isinstance(layer, nn.LayerNorm) and weight.dim() != 1:
        raise ValueError(f'a LayerNorm over {weight.dim()} axes has no channels')
    return weight.shape[0]


def input_channels(layer: nn.Module) -> int:
    """Number of input channels of a convolution or linear layer."""
    if normalises(layer):
        raise ValueError(f'{type(layer).__name__} normalises its inputs, so a scale of them is gone')
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels  # type: ignore[return-value]


def scaled_weight(layer: nn.Module, weight: Tensor, gate: Tensor | None, inputs: Tensor | None) -> Tensor:
    """Return ``weight`` of a layer with its outputs scaled by ``gate`` and its inputs by ``inputs``."""
    weight = weight if gate is None else scaled_rows(layer, weight, gate)
    return weight if inputs is None else scaled_columns(layer, weight, inputs)


def scaled_rows(layer: nn.Module, weight: Tensor, v: Tensor) -> Tensor:
    """Return ``weight`` of a layer with its outputs scaled by ``v`` ``(C_out,)``."""
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return second_axis(weight, v, layer.groups) if transposed else first_axis(weight, v)  # type: ignore[arg-type]


def scaled_columns(layer: nn.Module, weight: Tensor, u: Tensor) -> Tensor:
    """Return ``weight`` of a convolution or linear layer with its inputs scaled by ``u`` ``(C_in,)``."""
    if isinstance(layer, nn.Linear):
        return weight * u
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return first_axis(weight, u) if transposed else second_axis(weight, u, layer.groups)  # type: ignore[arg-type]


def first_axis(weight: Tensor, v: Tensor) -> Tensor:
    """Scale a weight ``(C, *)`` along its first axis."""
    return weight * v.view(-1, *(1,) * (weight.dim() - 1))


def second_axis(weight: Tensor, v: Tensor, groups: int) -> Tensor:
    """Scale a weight ``(D, C / groups, *)``: channel ``g C/groups + j`` is column j of group g of its rows."""
    w = weight.unflatten(0, (groups, -1))
    return (w * v.view(groups, 1, -1, *(1,) * (w.dim() - 3))).flatten(0, 1)
