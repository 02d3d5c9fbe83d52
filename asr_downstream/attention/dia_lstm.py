"""The DIA-LSTM cell (Huang et al., AAAI 2020, arXiv 1905.10671 and 2210.16101), as in the official code.

Source: gbup-group/DIANet, models/cifar/dia_resnet.py, classes LSTMCell and small_cell. With y_t the pooled map at the
t-th site of a stage, N channels and m = N // r:

    [i, f, g, o] = W2x relu(W1x y_t + b1x) + b2x  +  W2h relu(W1h h_{t-1} + b1h) + b2h       W1: N -> m, W2: m -> 4N
    c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)
    h_t = sigmoid(o) sigmoid(c_t)                             h_0 = c_0 = 0; h_t is both the gates and the next state

The sigmoid of c_t, where an LSTM has tanh, is what makes h_t a gate. Fresh gates lie near 0.25: a fresh cell quarters
every branch (``preserve=True`` divides that out). Parameters: 2 (5 N m + m + 4 N), whatever the number of sites.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from asr_downstream.attention.base import ChannelAttention, hidden_width, pool
from asr_downstream.registry import ATTENTIONS

__all__ = ['DIALSTM']

State: TypeAlias = tuple[Tensor, Tensor]


@ATTENTIONS.register_module()
class DIALSTM(ChannelAttention):
    """The recurrent unit of DIA. Used alone (plug ``Attention``) it does one step from the zero state.

    The weights keep the precision of the model; the state is float32 where that is lower.

    Args:
        channels: N.
        reduction: r, 4 as for CIFAR in the official code; the same authors use 20 for ResNet-50 on ImageNet.
    """

    recurrent: ClassVar[bool] = True
    of_mean: ClassVar[bool] = True

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__(channels)
        hidden = hidden_width(channels, reduction)
        self.ih = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, 4 * channels))
        self.hh = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, 4 * channels))

    def start_constant(self) -> None:
        for path in (self.ih, self.hh):
            nn.init.zeros_(path[2].weight)  # type: ignore[arg-type]

    def step(self, y: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One step, ``advance(drive(y), state)``.

        Args:
            y: descriptor ``(B, C)``.
            state: ``(h, c)`` of the site before, each ``(B, C)``; None is the zero state.

        Returns:
            The gates h ``(B, C)`` and the new state ``(h, c)``.
        """
        return self.advance(self.drive(y), state)

    def drive(self, y: Tensor) -> Tensor:
        """What descriptors ``(B, C)`` contribute to ``[i, f, g, o]``, ``(B, 4 C)``: the half of a step without a state.

        The rows may be those of several sites, whose halves are then computed at once.
        """
        weights: Any = self.ih[0].weight
        return self.ih(y.to(weights.dtype))

    def advance(self, drive: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The rest of a step, see `step`.

        Args:
            drive: what `drive` returned for the site.
            state: of the site before.
        """
        weights: Any = self.ih[0].weight
        h = weights.new_zeros(1, self.channels) if state is None else state[0].to(weights.dtype)
        gates = (drive + self.hh(h)).to(torch.promote_types(weights.dtype, torch.float32))
        i, f, g, o = gates.chunk(4, 1)
        c = i.sigmoid() * g.tanh()
        if state is not None:
            c = c + f.sigmoid() * state[1]
        h = o.sigmoid() * c.sigmoid()
        return h, (h, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(pool(x))[0]  # (B, C, *) -> (B, C)
