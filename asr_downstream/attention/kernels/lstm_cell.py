"""The pointwise half of the cell of DIA in few operators, forward and backward.

    [i, f, g, o] = drive + hidden
    c' = sigmoid(f) c + sigmoid(i) tanh(g)
    h' = sigmoid(o) sigmoid(c')

With t = dh' h' and all gates after their functions, s = sigmoid(c'):

    d_o = t (1 - o)         dc' += t (1 - s)         dc = dc' f
    d_i = dc' i g (1 - i)   d_f = dc' f c (1 - f)    d_g = dc' i (1 - g^2)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from asr_downstream.attention.kernels.functions import eager

__all__ = ['lstm_cell', 'plain_cell']


def lstm_cell(drive: Tensor, hidden: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """One step; in single precision where the inputs have less.

    Args:
        drive: contribution of the site to ``[i, f, g, o]``, ``(B, 4 C)``.
        hidden: that of the state before, ``(B, 4 C)`` or ``(1, 4 C)``.
        c: of the state before, ``(B, C)``; None is zero.

    Returns:
        The next h and c, ``(B, C)``.
    """
    if not eager():
        return plain_cell(drive, hidden, c)
    h, c, _ = Cell.apply(drive, hidden, c)
    return h, c


def plain_cell(drive: Tensor, hidden: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """`lstm_cell` as written above."""
    total = drive + hidden
    i, f, g, o = total.to(full(total.dtype)).chunk(4, 1)
    after = i.sigmoid() * g.tanh()
    if c is not None:
        after = after + f.sigmoid() * c
    return o.sigmoid() * after.sigmoid(), after


class Cell(torch.autograd.Function):
    """See `lstm_cell`. The gates [i, f, g, o] are an output as well: second derivatives go through it."""

    @staticmethod
    def forward(ctx: Any, drive: Tensor, hidden: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.inputs = (drive.dtype, drive.shape), (hidden.dtype, hidden.shape)
        total = drive + hidden
        gates = total.to(full(total.dtype))
        n = gates.shape[1] // 4
        gates[:, : 2 * n].sigmoid_()
        gates[:, 2 * n : 3 * n].tanh_()
        gates[:, 3 * n :].sigmoid_()
        i, f, g, o = gates.chunk(4, 1)
        after = i * g if c is None else (f * c).addcmul_(i, g)
        s = after.sigmoid()
        h = o * s
        ctx.save_for_backward(c, s, h, after, gates)
        return h, after, gates

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dc: Tensor | None, d_gates: Tensor | None) -> tuple[Tensor | None, ...]:
        c, s, h, after, gates = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: of the output, with its graph
            s = after.sigmoid()
        i, f, g, o = gates.chunk(4, 1)
        d_o = none = o.new_zeros(1).expand_as(o) if dh is None or c is None else o
        if dh is not None:
            t = dh * h
            d_o = one_minus(t, o)
            dc = one_minus(t, s) if dc is None else one_minus(t, s) + dc
        if dc is None:
            d, dc = none.repeat(1, 4), None
        elif c is None:
            d_g = dc * i
            d_i = d_g * g
            d, dc = torch.cat([one_minus(d_i, i), none, torch.addcmul(d_g, d_i, g, value=-1), d_o], 1), None
        else:
            first = gates.chunk(2, 1)[0].unflatten(1, (2, -1))
            ds = dc[:, None] * first  # d_g / (1 - g^2), and the gradient of c
            dif = ds * torch.stack([g, c], 1)
            d_g = torch.addcmul(ds[:, 0], dif[:, 0], g, value=-1)
            d, dc = torch.cat([one_minus(dif, first).reshape(len(first), -1), d_g, d_o], 1), ds[:, 1]
        if d_gates is not None:
            d = d + d_gates * torch.cat([one_minus(i, i), one_minus(f, f), 1 - g * g, one_minus(o, o)], 1)
        drive, hidden = (d.sum_to_size(shape).to(dtype) for dtype, shape in ctx.inputs)
        return drive, hidden, dc


def full(dtype: torch.dtype) -> torch.dtype:
    """Precision of the state."""
    return torch.promote_types(dtype, torch.float32)


def one_minus(t: Tensor, gate: Tensor) -> Tensor:
    """``t (1 - gate)``."""
    return torch.addcmul(t, t, gate, value=-1)
