"""Gates of convolutions and linear layers that cost the backward pass no memory: what it needs is computed again.

Constant gates v: conv(x; W v, b v) would keep the product W v beside W. The backward pass multiplies again. So it is
with gates u of the inputs, whose product with the columns of W is a second one.

Input-dependent gates: y = conv(x), h = gate(mean(y)), z = y h. The product keeps y, which the stock model does not: in
a UNet that is a tenth of all saved activations. But y follows from x and the weights, which the convolution keeps
anyway, so the backward pass computes it again for dh = sum(dz y); dy = dz h needs no y. The price is one more
convolution a site.

Used where there is something to save, with gradients: constant gates outside of autocast; with ``memory='low'`` also
input-dependent gates that depend on the mean alone, one attention a site. Elsewhere the plain form runs, as under
torch.compile (which decides by itself what to keep), in torch.func transforms and with forward-mode derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from asr_downstream.attention.kernels.functions import ordinary
from asr_downstream.modules.affine import scaled_weight
from asr_downstream.plugging.gating.shelf import Ready
from asr_downstream.plugging.kernels.memory import low_memory

__all__ = ['can_regain', 'can_rescale', 'regainable', 'regained_scale', 'rescaled_layer']


def can_regain(layer: Any, y: Tensor) -> bool:
    """Whether a plugged layer with input-dependent gates may take `regained_scale` for its output ``y``."""
    return (
        low_memory(layer) and layer.recomputes and ordinary() and y.requires_grad and y.dim() > 2 and regainable(layer)
    )


def regainable(layer: Any) -> bool:
    """Whether `regained_scale` can apply the input-dependent gates of a plugged layer."""
    return len(layer.dynamic) == 1 and layer.dynamic[0].of_mean


def regained_scale(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """Scale the output of a layer by its input-dependent gates.

    Args:
        layer: plugged; ``layer.stock_forward(x, weight, bias)`` gave ``y``.
        x: input of the layer.
        weight: that the layer used, scaled by constant gates if there are any.
        bias: likewise.
        y: output, ``(B, C, *)``, or ``(B, *, C)`` where the layer says ``channel_dim = -1``.
    """
    last = layer.channel_dim == -1
    positions = tuple(range(1, y.dim() - 1)) if last else tuple(range(2, y.dim()))
    h = layer.dynamic[0].gates(y.mean(positions)).to(y.dtype)
    for axis in positions:
        h = h.unsqueeze(axis)
    return Scale.apply(y, h, layer, x, weight, bias)


class Scale(torch.autograd.Function):
    """``y h``; keeps what gives y instead of y."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, h: Tensor, layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(h, x, weight, bias)
        ctx.layer = layer
        kind = y.device.type
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        return y * h

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        h, x, weight, bias = ctx.saved_tensors
        dy = dz * h if ctx.needs_input_grad[0] else None
        dh = None
        if ctx.needs_input_grad[1]:
            kind, dtype, enabled = ctx.autocast
            with torch.autocast(kind, dtype, enabled, cache_enabled=False):
                y = ctx.layer.stock_forward(x, weight, bias)
            dh = (dz * y).sum_to_size(h.shape)
        return dy, dh, None, None, None, None


def can_rescale(layer: Any, x: Tensor, ready: Ready) -> bool:
    """Whether a plugged layer with constant gates may take `rescaled_layer` for its input ``x``."""
    gate, _, inputs = ready.constants
    return (
        layer.recomputes
        and ordinary()
        and any(t is not None and t.requires_grad for t in (layer.weight, gate, inputs))
        and x.dtype == layer.weight.dtype
        and not torch.is_autocast_enabled(x.device.type)
        and layer.has_backward(x)
    )


def rescaled_layer(layer: Any, x: Tensor, ready: Ready) -> Tensor:
    """Output of a layer with constant gates.

    Args:
        layer: plugged; its ``stock_backward`` gives the gradients of ``stock_forward``.
        x: input of the layer.
        ready: its gates.
    """
    return Rescaled.apply(x, layer.weight, ready.scaled_bias(layer), ready.v, ready.constants.inputs, layer)


class Rescaled(torch.autograd.Function):
    """``stock_forward(x, W v u, b)`` with v along the rows and u along the columns of W; keeps W, v and u."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, v: Tensor | None, u: Tensor | None, layer: Any
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, v, u)
        ctx.layer = layer
        ctx.bias = bias is not None
        return layer.stock_forward(x, scaled_weight(layer, weight, v, u), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, v, u = ctx.saved_tensors
        rows = scaled_weight(ctx.layer, weight, v, None)
        scaled = scaled_weight(ctx.layer, rows, None, u)
        dx, dw, db = ctx.layer.stock_backward(dy, x, scaled, ctx.bias, ctx.needs_input_grad[0])
        du = None if u is None else column_products(dw, rows, getattr(ctx.layer, 'groups', 1))
        dw = scaled_weight(ctx.layer, dw, None, u)
        dv = None if v is None else row_products(dw, weight)
        dw = scaled_weight(ctx.layer, dw, v, None) if ctx.needs_input_grad[1] else None
        return dx, dw, db, dv, du, None


def column_products(a: Tensor, b: Tensor, groups: int) -> Tensor:
    """Inner products of the columns of ``a`` and ``b`` ``(D, C / groups, *)``, group by group: ``(C,)``."""
    by_group = (a * b).unflatten(0, (groups, -1))
    return by_group.sum((1, *range(3, by_group.dim()))).flatten()


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the rows of ``a`` and ``b`` ``(C, *)``: in one operator, where no copy is needed for that."""
    if not (a.is_contiguous() and b.is_contiguous()):
        return (a * b).flatten(1).sum(1)
    return torch.bmm(a.flatten(1).unsqueeze(1), b.flatten(1).unsqueeze(2)).flatten()
