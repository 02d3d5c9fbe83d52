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

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from asr_downstream.attention.base import ChannelAttention, hidden_width, pool
from asr_downstream.attention.kernels.functions import eager
from asr_downstream.attention.kernels.late_weights import LateWeights
from asr_downstream.attention.kernels.lstm_cell import lstm_step, plain_cell
from asr_downstream.registry import ATTENTIONS

__all__ = ['DIALSTM']


class State(NamedTuple):
    """What a site hands to the next one.

    Attributes:
        h: ``(B, C)``.
        c: ``(B, C)``.
        late: the weights, where their gradients are computed at the end for all sites.
    """

    h: Tensor
    c: Tensor
    late: LateWeights | None = None


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
            state: of the site before; None is the zero state.

        Returns:
            The gates h ``(B, C)`` and the new state.
        """
        late = self.late(state)
        if late is None:
            return self.plainly(self.drive(y), state)
        return self.jointly(y, False, state, late)

    def drive(self, y: Tensor) -> Tensor:
        """What descriptors ``(B, C)`` contribute to ``[i, f, g, o]``, ``(B, 4 C)``: the half of a step without a state.

        The rows may be those of several sites, whose halves are then computed at once.
        """
        return self.ih(y.to(self.dtype))

    def advance(self, drive: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The rest of a step, see `step`.

        Args:
            drive: what `drive` returned for the site.
            state: of the site before.
        """
        late = self.late(state)
        return self.plainly(drive, state) if late is None else self.jointly(drive, True, state, late)

    def jointly(self, x: Tensor, driven: bool, state: State | None, late: LateWeights) -> tuple[Tensor, State]:
        """A step as one function, see `asr_downstream.attention.kernels.lstm_cell`."""
        before, c = (None, None) if state is None else (state.h, state.c)
        h, c = lstm_step(x, driven, before, c, late)
        return h, State(h, c, late)

    def plainly(self, drive: Tensor, state: State | None) -> tuple[Tensor, State]:
        """A step by the layers and the equations."""
        h, c = (drive.new_zeros(1, self.channels), None) if state is None else (state.h, state.c)
        h, c = plain_cell(drive, self.hh(h.to(self.dtype)), c)
        return h, State(h, c)

    def late(self, state: State | None) -> LateWeights | None:
        """The weights as all sites of a run use them, from the first on; None: the layers run as they are."""
        before = None if state is None else state.late
        weight = next(self.parameters()) if before is None else before.tensors[0]
        if not eager() or torch.is_autocast_enabled(weight.device.type):
            return None
        if before is not None or not self.bare:
            return before
        return LateWeights([self.ih[0], self.ih[2], self.hh[0], self.hh[2]])  # type: ignore[list-item]

    @property
    def bare(self) -> bool:
        """Whether nobody has put hooks or other layers into the two paths."""
        return all(
            [type(m) for m in path] == [nn.Linear, nn.ReLU, nn.Linear]
            and not any(
                m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
                for m in (path, *path)
            )
            for path in (self.ih, self.hh)
        )

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        first: Any = self.ih[0]
        return first.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.step(pool(x))[0]  # (B, C, *) -> (B, C)
