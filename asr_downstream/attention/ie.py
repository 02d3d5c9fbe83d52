"""Instance Enhancement, the gate of IEBN (Liang et al., AAAI 2020, arXiv 1908.04008; gbup-group/IEBN iebn_resnet.py).

    gate = sigmoid(w * GAP(x) + b)                      w, b: one number a channel, w = 0 and b = -1 at the start

On a learned input the pooling is the identity; w = 0, so psi gets its first gradient only after w has moved.
Fresh gates are sigmoid(-1) = 0.269 exactly, for every input. Parameters: 2 C.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from asr_downstream.attention.base import ChannelAttention, pool
from asr_downstream.registry import ATTENTIONS

__all__ = ['IE']


@ATTENTIONS.register_module()
class IE(ChannelAttention):
    """Instance Enhancement.

    Deviation from IEBN: there the descriptor is the mean of the normalisation's input and the gate multiplies only its
    gamma. Here it is the mean of the layer's output and the gate multiplies the output, as for every attention.

    Args:
        channels: C.
        bias_init: start of b.
    """

    of_mean: ClassVar[bool] = True

    def __init__(self, channels: int, bias_init: float = -1.0) -> None:
        super().__init__(channels)
        self.weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.full((channels,), bias_init))

    def start_constant(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * pool(x) + self.bias).sigmoid()  # (B, C, *) -> (B, C)

    def batched(self, parameters: dict[str, Tensor], psi: Tensor) -> Tensor:
        """See `ChannelAttention`."""
        return torch.addcmul(parameters['bias'], parameters['weight'], psi.squeeze(1)).sigmoid()
