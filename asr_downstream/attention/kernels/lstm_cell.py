"""A step of the cell of DIA as one function: few operators, forward and backward, and little Python.

    drive = W2x relu(W1x y + b1x) + b2x
    [i, f, g, o] = drive + W2h relu(W1h h + b1h) + b2h
    c' = sigmoid(f) c + sigmoid(i) tanh(g)
    h' = sigmoid(o) sigmoid(c')

With t = dh' h' and all gates after their functions, s = sigmoid(c'):

    d_o = t (1 - o)         dc' += t (1 - s)         dc = dc' f
    d_i = dc' i g (1 - i)   d_f = dc' f c (1 - f)    d_g = dc' i (1 - g^2)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from asr_downstream.attention.kernels.late_weights import LateWeights, Rows, keep

__all__ = ['full', 'lstm_step', 'plain_cell']

IH, HH = 0, 2  # number of the first of the two layers of each half, in LateWeights


def lstm_step(x: Tensor, driven: bool, h: Tensor | None, c: Tensor | None, late: LateWeights) -> tuple[Tensor, Tensor]:
    """One step; the state is in single precision where the weights have less.

    Args:
        x: descriptor y ``(B, C)``, or ``drive`` ``(B, 4 C)``.
        driven: whether it is the latter.
        h: of the state before, ``(B, C)``; None is zero.
        c: likewise.
        late: the four layers, in the order of the equations.

    Returns:
        The next h and c.
    """
    return Step.apply(x, h, c, driven, late.rows, *late.tensors)


def plain_cell(drive: Tensor, hidden: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """The pointwise half: h' and c' from the two contributions to the gates."""
    total = drive + hidden
    i, f, g, o = total.to(full(total.dtype)).chunk(4, 1)
    after = i.sigmoid() * g.tanh()
    if c is not None:
        after = after + f.sigmoid() * c
    return o.sigmoid() * after.sigmoid(), after


def perceptron(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Two linear layers with a ReLU between."""
    return F.linear(F.linear(x, w1, b1).relu(), w2, b2)


class Step(torch.autograd.Function):
    """See `lstm_step`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor | None, c: Tensor | None, driven: bool, rows: Rows, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        w1x, b1x, w2x, b2x, w1h, b1h, w2h, b2h = weights
        ctx.set_materialize_grads(False)
        ctx.driven, ctx.rows = driven, rows
        u = None if driven else F.linear(cast(x, w1x.dtype), w1x, b1x).relu_()
        v = b1h.relu()[None] if h is None else F.linear(cast(h, w1h.dtype), w1h, b1h).relu_()
        total = (x if u is None else F.linear(u, w2x, b2x)) + F.linear(v, w2h, b2h)
        gates = cast(total, full(total.dtype))
        n = gates.shape[1] // 4
        i, f, g, o = gates.chunk(4, 1)
        gates[:, : 2 * n].sigmoid_()
        g.tanh_()
        o.sigmoid_()
        after = i * g if c is None else (f * c).addcmul_(i, g)
        s = after.sigmoid()
        out = o * s
        ctx.save_for_backward(x, h, c, u, v, gates, s, out, *weights)
        return out, after

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dc: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h, c, u, v, gates, s, out, *weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return graph(ctx, (x, h, c), weights, dh, dc)
        n = gates.shape[1] // 4
        i, f, g, o = gates.chunk(4, 1)
        if dh is not None:
            t = dh * out
            d_o = one_minus(t, o)
            dc = one_minus(t, s) if dc is None else one_minus(t, s) + dc
        elif dc is None:
            return (None,) * 13
        else:
            d_o = dc.new_zeros(1).expand_as(dc)
        if c is None:
            d_g = dc * i
            d_i = d_g * g
            parts: tuple[Tensor, ...] = one_minus(d_i, i), dc.new_zeros(1).expand_as(dc)
            d_g, dc = torch.addcmul(d_g, d_i, g, value=-1), None
        else:
            first = gates[:, : 2 * n].view(-1, 2, n)
            ds = dc[:, None] * first  # d_g / (1 - g^2), and the gradient of c
            dif = ds * torch.stack([g, c], 1)
            parts = (one_minus(dif, first).reshape(-1, 2 * n),)
            d_g, dc = torch.addcmul(ds[:, 0], dif[:, 0], g, value=-1), ds[:, 1]
        d = cast(torch.cat([*parts, d_g, d_o], 1), v.dtype)
        w1x, _, w2x, _, w1h, _, w2h, _ = weights
        pairs = {}
        dx = d
        if not ctx.driven:
            du = torch.ops.aten.threshold_backward(d @ w2x, u, 0)
            pairs = {IH: (du, cast(x, u.dtype)), IH + 1: (d, u)}
            dx = du @ w1x if ctx.needs_input_grad[0] else None
        if len(v) != len(d):
            d = d.sum(0, keepdim=True)
        dv = torch.ops.aten.threshold_backward(d @ w2h, v, 0)
        pairs[HH] = dv, w1h.new_zeros(1, n) if h is None else cast(h, v.dtype)
        pairs[HH + 1] = d, v
        dh = dv @ w1h if ctx.needs_input_grad[1] else None
        direct: list[Tensor | None] = [None] * 8
        if torch.compiler.is_compiling():  # compiled autograd
            for layer, (dy, rows) in pairs.items():
                direct[2 * layer : 2 * layer + 2] = dy.t() @ rows, dy.sum(0)
        else:
            keep(ctx.rows, ctx.next_functions[-1][0], pairs)
        return cast(dx, x.dtype), dh if h is None else cast(dh, h.dtype), dc, None, None, *direct


def graph(ctx: Any, inputs: Any, weights: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients with graphs of their own: those of the plain formulas."""
    # Aliases: of each tensor only what goes through here.
    tensors: list[Any] = [None if t is None else t.view_as(t) for t in (*inputs, *weights)]
    x, h, c, *w = tensors
    zero = w[4].new_zeros(1, w[4].shape[1])
    drive = x if ctx.driven else perceptron(x.to(w[0].dtype), *w[:4])
    ys = plain_cell(drive, perceptron(zero if h is None else h.to(w[4].dtype), *w[4:]), c)
    pairs = [(y, dy) for y, dy in zip(ys, dys, strict=True) if dy is not None]
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in pairs], wanted, [dy for _, dy in pairs], create_graph=True, allow_unused=True
        )
    ) if pairs else iter([None] * len(wanted))  # fmt: skip
    dx, dh, dc, *dw = (next(found) if t is not None and t.requires_grad else None for t in tensors)
    return dx, dh, dc, None, None, *dw


def full(dtype: torch.dtype) -> torch.dtype:
    """Precision of the state."""
    return torch.promote_types(dtype, torch.float32)


def cast(t: Any, dtype: torch.dtype) -> Any:
    """``t.to(dtype)``, without asking the dispatcher where it is; None stays."""
    return t if t is None or t.dtype == dtype else t.to(dtype)


def one_minus(t: Tensor, gate: Tensor) -> Tensor:
    """``t (1 - gate)``."""
    return torch.addcmul(t, t, gate, value=-1)
