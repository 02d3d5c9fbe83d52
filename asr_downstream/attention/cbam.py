"""Convolutional Block Attention Module (Woo et al., ECCV 2018, arXiv 1807.06521).

Source: Jongchan/attention-module, MODELS/cbam.py.

    channel half: s = sigmoid(MLP(avg(x)) + MLP(max(x)))              MLP: C -> C/r -> C without biases, r = 16
    spatial half: sigmoid(BN(conv7x7([max_c(x s), mean_c(x s)])))     one map for all channels

On a learned input avg equals max, so s = sigmoid(2 MLP(psi)), and there are no positions to attend to: only the
channel half is built (``spatial=False``). How the ASR authors treated the spatial half is not known. Fresh channel
gates lie near 0.5, fresh maps near 0.5. Parameters: 2 C C/r, and 2 * 49 + 2 for the spatial half.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from asr_downstream.attention.base import ChannelAttention, hidden_width, pool
from asr_downstream.errors import PlugError
from asr_downstream.registry import ATTENTIONS

__all__ = ['CBAM']


@ATTENTIONS.register_module()
class CBAM(ChannelAttention):
    """Channel and spatial attention. With ``spatial=True`` the gates are ``(B, C, H, W)`` and the input is a 2d map.

    Deviation from the official code: the MLP has no biases, as the parameter counts of the ASR tables require.

    Args:
        channels: C.
        reduction: r, the bottleneck.
        spatial: build the spatial half (the default on feature maps).
    """

    on_learned_input: ClassVar[dict[str, Any]] = {'spatial': False}

    def __init__(self, channels: int, reduction: int = 16, spatial: bool = True) -> None:
        super().__init__(channels)
        hidden = hidden_width(channels, reduction)
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, channels, bias=False)
        )
        self.spatial = (
            nn.Sequential(nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1, momentum=0.01))
            if spatial
            else None
        )

    def start_constant(self) -> None:
        nn.init.zeros_(self.mlp[2].weight)  # type: ignore[arg-type]
        if self.spatial is not None:
            nn.init.zeros_(self.spatial[0].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        highest = x.flatten(2).amax(-1) if x.dim() > 2 else x  # (B, C)
        gate = (self.mlp(pool(x)) + self.mlp(highest)).sigmoid()  # (B, C)
        if self.spatial is None:
            return gate
        if x.dim() != 4:
            raise PlugError(f'CBAM: the spatial half needs maps (B, C, H, W), got {tuple(x.shape)}: set spatial=False')
        gate = gate[:, :, None, None]
        scaled = x * gate
        stacked = torch.cat([scaled.amax(1, keepdim=True), scaled.mean(1, keepdim=True)], 1)  # (B, 2, H, W)
        return gate * self.spatial(stacked).sigmoid()  # (B, C, H, W)
