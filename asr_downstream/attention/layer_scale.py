"""LayerScale (Touvron et al., ICCV 2021, arXiv 2103.17239), a control: one free number a channel.

    gate = gamma                                        gamma: (C,), 1e-5 at the start, not confined to (0, 1)

It has no input, so a learned input changes nothing and no psi is made. Parameters: C.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from asr_downstream.attention.base import ChannelAttention
from asr_downstream.registry import ATTENTIONS

__all__ = ['LayerScale']


@ATTENTIONS.register_module()
class LayerScale(ChannelAttention):
    """A learned vector of scales.

    Args:
        channels: C.
        init_value: start of gamma (the paper: 0.1 to depth 18, 1e-5 to 24, 1e-6 beyond).
    """

    uses_input: ClassVar[bool] = False
    confined: ClassVar[bool] = False

    def __init__(self, channels: int, init_value: float = 1e-5) -> None:
        super().__init__(channels)
        self.gamma = nn.Parameter(torch.full((channels,), init_value))

    def start_constant(self) -> None:
        """Nothing to do: the gates never depend on the input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma.expand(x.shape[0], -1)  # (B, C)

    def batched(self, parameters: dict[str, Tensor], psi: None) -> Tensor:
        """See `ChannelAttention`."""
        return parameters['gamma']
