"""Squeeze-and-Excitation (Hu et al., CVPR 2018, arXiv 1709.01507), as in the official ASR code (modules/senet.py).

    gate = sigmoid(W2 relu(W1 GAP(x) + b1) + b2)        W1: C -> C/r, W2: C/r -> C, with biases, r = 16

On a learned input (1, C) the pooling is the identity. Fresh gates scatter around 0.5. Parameters: 2 C C/r + C/r + C.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from asr_downstream.attention.base import ChannelAttention, hidden_width, pool
from asr_downstream.registry import ATTENTIONS

__all__ = ['SE']


@ATTENTIONS.register_module()
class SE(ChannelAttention):
    """Squeeze-and-Excitation.

    Deviation from the official code: the hidden width is ``max(C // reduction, 1)``, not ``round(C / reduction)``.

    Args:
        channels: C.
        reduction: r, the bottleneck.
        bias: biases of the two linear layers; the ASR tables count them.
    """

    of_mean: ClassVar[bool] = True

    def __init__(self, channels: int, reduction: int = 16, bias: bool = True) -> None:
        super().__init__(channels)
        hidden = hidden_width(channels, reduction)
        self.fc1 = nn.Linear(channels, hidden, bias=bias)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(hidden, channels, bias=bias)

    def start_constant(self) -> None:
        nn.init.zeros_(self.fc2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.relu(self.fc1(pool(x)))).sigmoid()  # (B, C, *) -> (B, C)

    def batched(self, parameters: dict[str, Tensor], psi: Tensor) -> Tensor:
        """See `ChannelAttention`. Weights stand on the left, so that their gradients come in their own layout."""
        h = affine(parameters, 'fc1', psi.transpose(1, 2)).relu()  # (sites, C, 1) -> (sites, C/r, 1)
        return affine(parameters, 'fc2', h).sigmoid().squeeze(2)


def affine(parameters: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A linear layer a site: ``(sites, in, 1) -> (sites, out, 1)``."""
    weight, bias = parameters[f'{name}.weight'], parameters.get(f'{name}.bias')
    return torch.bmm(weight, x) if bias is None else torch.baddbmm(bias.unsqueeze(2), weight, x)
