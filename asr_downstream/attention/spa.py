"""Spatial Pyramid Attention (Guo et al., ICME 2020; ma-xu/SPANet models/spp_se_resnet.py).

    gate = sigmoid(W2 relu(W1 [pool_1(x), pool_2(x), pool_4(x)]))    W1: 21 C -> C/r, W2: C/r -> C, no biases, r = 16

On a learned input every cell of the pyramid is psi itself (21 copies). Fresh gates lie near 0.5.
Parameters: 22 C C/r.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr_downstream.attention.base import ChannelAttention, hidden_width
from asr_downstream.registry import ATTENTIONS

__all__ = ['SPA']

LEVELS = (1, 2, 4)


@ATTENTIONS.register_module()
class SPA(ChannelAttention):
    """Spatial pyramid attention; maps of one or three spatial axes are pooled as one line or slab of positions.

    Args:
        channels: C.
        reduction: r, the bottleneck.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__(channels)
        hidden = hidden_width(channels, reduction)
        self.fc1 = nn.Linear(sum(n * n for n in LEVELS) * channels, hidden, bias=False)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(hidden, channels, bias=False)

    def start_constant(self) -> None:
        nn.init.zeros_(self.fc2.weight)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:  # (B, C, *) -> (B, C, positions, rest)
            x = x.reshape(*x.shape[:2], -1, 1) if x.dim() < 5 else x.flatten(3)
        pyramid = [F.adaptive_avg_pool2d(x, n).flatten(1) for n in LEVELS]  # (B, n n C)
        return self.fc2(self.relu(self.fc1(torch.cat(pyramid, 1)))).sigmoid()
