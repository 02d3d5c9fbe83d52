"""Layers that an adapter goes into: known by the class of torch that they are, or extend.

Where there are only weights, `stand_in` makes a layer of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from asr_downstream.errors import CheckpointError

__all__ = ['KINDS', 'kind_of', 'member', 'stand_in']

Make = Callable[[Any, Tensor, int], nn.Module]


def convolution(cls: Any, weight: Tensor, groups: int) -> nn.Module:
    """Make a convolution whose weight is ``(out, in / groups, *)``."""
    return cls(weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), groups=groups)


def transposed(cls: Any, weight: Tensor, groups: int) -> nn.Module:
    """Make a transposed convolution, whose weight is ``(in, out / groups, *)``."""
    return cls(weight.shape[0], weight.shape[1] * groups, tuple(weight.shape[2:]), groups=groups)


def linear(cls: Any, weight: Tensor, groups: int) -> nn.Module:
    """Make a linear layer, whose weight is ``(out, in)``."""
    return cls(weight.shape[1], weight.shape[0])


def norm(cls: Any, weight: Tensor, groups: int) -> nn.Module:
    """Make a norm, whose weight is ``(C,)``."""
    return cls(weight.shape[0], affine=True)


def group_norm(cls: Any, weight: Tensor, groups: int) -> nn.Module:
    """Make a group norm; into how many groups its input is split is nothing to its weight."""
    return cls(1, weight.shape[0])


def layer_norm(cls: Any, weight: Tensor, groups: int) -> nn.Module:
    """Make a layer norm."""
    return cls(weight.shape[0])


# Class of torch -> how one is made, and the number of axes of its weight.
MADE: dict[Any, tuple[Make, int]] = {
    nn.Conv1d: (convolution, 3),
    nn.Conv2d: (convolution, 4),
    nn.Conv3d: (convolution, 5),
    nn.ConvTranspose1d: (transposed, 3),
    nn.ConvTranspose2d: (transposed, 4),
    nn.ConvTranspose3d: (transposed, 5),
    nn.Linear: (linear, 2),
    nn.BatchNorm1d: (norm, 1),
    nn.BatchNorm2d: (norm, 1),
    nn.BatchNorm3d: (norm, 1),
    nn.SyncBatchNorm: (norm, 1),
    nn.InstanceNorm1d: (norm, 1),
    nn.InstanceNorm2d: (norm, 1),
    nn.InstanceNorm3d: (norm, 1),
    nn.GroupNorm: (group_norm, 1),
    nn.LayerNorm: (layer_norm, 1),
}
KINDS: dict[str, Any] = {cls.__name__: cls for cls in MADE}


def kind_of(layer: nn.Module) -> str | None:
    """Name of the class of torch that a layer is or extends; None: an adapter does not go into it."""
    found = next((name for name, cls in KINDS.items() if isinstance(layer, cls)), None)
    batch_norm = isinstance(layer, nn.modules.batchnorm._BatchNorm)  # frameworks have some of any number of axes
    return 'BatchNorm2d' if found is None and batch_norm else found


def stand_in(path: str, kind: str, groups: int, state: Mapping[str, Tensor]) -> nn.Module:
    """Make a layer that has the weight and bias of a state dict.

    Args:
        path: of the layer.
        kind: one of `KINDS`.
        groups: of a convolution.
        state: of the whole model.

    Raises:
        CheckpointError: there is no such weight, or that of another kind of layer.
    """
    weight, bias = (state.get(member(path, name)) for name in ('weight', 'bias'))
    if weight is None:
        raise CheckpointError(f'{member(path, "weight")}: is not in these weights')
    make, axes = MADE[KINDS[kind]]
    if weight.dim() != axes or not weight.is_floating_point() or not weight.numel():
        raise CheckpointError(
            f'{member(path, "weight")}: is {weight.dtype} of shape {tuple(weight.shape)}, not the weight of a {kind}'
        )
    try:
        with torch.device('meta'):
            layer: Any = make(KINDS[kind], weight, groups)
    except ValueError as error:
        raise CheckpointError(f'{path}: no {kind} has a weight of shape {tuple(weight.shape)} ({error})') from error
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def member(path: str, name: str) -> str:
    """Name of a weight of the module at a path; that of the model itself is empty."""
    return f'{path}.{name}' if path else name
