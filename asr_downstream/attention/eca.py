"""Efficient Channel Attention (Wang et al., CVPR 2020, arXiv 1910.03151; BangguWu/ECANet models/eca_module.py).

    gate = sigmoid(conv1d_k(GAP(x)))                    one kernel of k taps runs over the channels, no bias

On a learned input the pooling is the identity. A constant psi gives all inner channels the same gate (the ends see
the zero padding), so only psi tells channels apart: it needs its gradient. Fresh gates lie near 0.5. Parameters: k.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from asr_downstream.attention.base import ChannelAttention, pool
from asr_downstream.errors import PlugError
from asr_downstream.registry import ATTENTIONS

__all__ = ['ECA']


@ATTENTIONS.register_module()
class ECA(ChannelAttention):
    """Efficient channel attention.

    Args:
        channels: C.
        kernel_size: k, odd; ``'adaptive'`` takes the odd number at ``|log2(C) / 2 + 1 / 2|`` (paper, Eq. 12).
    """

    of_mean: ClassVar[bool] = True

    def __init__(self, channels: int, kernel_size: int | str = 3) -> None:
        super().__init__(channels)
        if kernel_size == 'adaptive':
            kernel_size = int(abs(math.log2(channels) / 2 + 0.5)) | 1
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise PlugError(f"ECA: kernel_size={kernel_size!r} must be an odd number or 'adaptive'")
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def start_constant(self) -> None:
        nn.init.zeros_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(pool(x)[:, None]).squeeze(1).sigmoid()  # (B, C) -> (B, 1, C) -> (B, C)

    def batched(self, parameters: dict[str, Tensor], psi: Tensor) -> Tensor:
        """See `ChannelAttention`: the sites are the groups of one convolution."""
        kernels = parameters['conv.weight'].squeeze(1)  # (sites, 1, k)
        padding: Any = self.conv.padding
        return F.conv1d(psi.transpose(0, 1), kernels, padding=padding, groups=len(psi)).squeeze(0).sigmoid()
