"""Sigmoid vector, a control: SE on a learned input with only its last bias (no paper).

    gate = sigmoid(vector)                              vector: (C,), 0 at the start, so fresh gates are 0.5

It reaches every gate that ASR(SE) reaches with C parameters: papers that claim more for ASR need this row.
It has no input, so a learned input changes nothing and no psi is made.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from asr_downstream.attention.base import ChannelAttention
from asr_downstream.registry import ATTENTIONS

__all__ = ['SigmoidVector']


@ATTENTIONS.register_module()
class SigmoidVector(ChannelAttention):
    """A learned vector of logits.

    Args:
        channels: C.
        init_value: start of the logits.
    """

    uses_input: ClassVar[bool] = False

    def __init__(self, channels: int, init_value: float = 0.0) -> None:
        super().__init__(channels)
        self.vector = nn.Parameter(torch.full((channels,), init_value))

    def start_constant(self) -> None:
        """Nothing to do: the gates never depend on the input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.vector.sigmoid().expand(x.shape[0], -1)  # (B, C)

    def batched(self, parameters: dict[str, Tensor], psi: None) -> Tensor:
        """See `ChannelAttention`."""
        return parameters['vector'].sigmoid()
