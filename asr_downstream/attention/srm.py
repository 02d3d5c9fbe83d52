"""Style-based Recalibration Module (Lee et al., ICCV 2019, arXiv 1903.10829).

Source: hyunjaelee410/style-based-recalibration-module, models/recalibration_modules.py.

    gate = sigmoid(N(w1 * mean(x) + w2 * std(x)))       w: (C, 2), zero at the start; N: BatchNorm over the batch

On a learned input (1, C) there is one position and one sample. How the ASR authors ran SRM there is not known; here
the std of one position is 0 (the unbiased estimate would be NaN), and N is a per-channel affine
(``norm='affine'``: BatchNorm cannot train on one sample). Fresh gates are 0.5 exactly. Parameters: 4 C.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from asr_downstream.attention.base import ChannelAttention, pool
from asr_downstream.errors import PlugError
from asr_downstream.registry import ATTENTIONS

__all__ = ['SRM', 'ChannelAffine']


class ChannelAffine(nn.Module):
    """``weight * z + bias`` per channel, ``(B, C) -> (B, C)``: BatchNorm's affine without its statistics."""

    normalises: ClassVar[bool] = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, z: Tensor) -> Tensor:
        return self.weight * z + self.bias


@ATTENTIONS.register_module()
class SRM(ChannelAttention):
    """Style-based recalibration.

    Args:
        channels: C.
        norm: ``'batch'`` (as published) or ``'affine'`` (the default on a learned input).
        eps: added to the variance before the square root.
    """

    on_learned_input: ClassVar[dict[str, Any]] = {'norm': 'affine'}

    def __init__(self, channels: int, norm: str = 'batch', eps: float = 1e-5) -> None:
        super().__init__(channels)
        norms = {'batch': nn.BatchNorm1d, 'affine': ChannelAffine}
        if norm not in norms:
            raise PlugError(f"SRM: norm={norm!r} is not known, use 'batch' or 'affine'")
        self.cfc = nn.Parameter(torch.zeros(channels, 2))
        self.norm = norms[norm](channels)
        self.eps = eps

    def start_constant(self) -> None:
        nn.init.zeros_(self.cfc)

    def forward(self, x: Tensor) -> Tensor:
        mean = pool(x)  # (B, C)
        if x.dim() > 2 and x[0, 0].numel() > 1:
            std = (x.flatten(2).var(-1) + self.eps).sqrt()  # (B, C)
        else:
            std = torch.zeros_like(mean)
        return self.norm(self.cfc[:, 0] * mean + self.cfc[:, 1] * std).sigmoid()
