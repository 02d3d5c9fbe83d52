"""Batch norm, descriptor, gate and scale as one affine of each sample: input-dependent gates without a map to keep.

Plain form: y = BN(x), h = gate(mean(y)), z = y h. It reads the map twice more than BN does and keeps y for the backward
pass. But pooling commutes with an affine, so with m the mean of each sample and channel, mu and a the mean and slope
of the batch norm,

    d = (m - mu) a + beta             the descriptor, mean(BN(x)) without BN(x)
    z = (a h) (x - mu) + beta h       one affine a sample and channel

Forward: one pass for the moments of each sample, from which the batch statistics follow, and one for the affine.
Backward: one pass for the two sums, one for the gradient; x is all that is kept, as in BN. What lies between the two
passes are vectors, and ordinary autograd: the attention is differentiated, shared, compiled and checkpointed as always.

This form is used where it was measured to pay, and gives what the plain form gives: batch norm (training, eval, frozen)
on contiguous maps on the CPU, in one precision, before attentions whose gates depend on the mean alone. Elsewhere the
plain form runs: other layers and devices, channels_last, autocast, SyncBN while it synchronises, torch.compile (which
fuses by itself), torch.func transforms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ['can_fuse', 'gated_batch_norm']

DEVICES = ('cpu',)
NORM_BACKWARD = torch.ops.aten.native_batch_norm_backward


class Link:
    """From `Affine` to `Moments` in a backward pass: the gradient of z and the slope, of which dx is made at once."""

    def __init__(self) -> None:
        self.sent: tuple[int, Tensor, Tensor] | None = None

    def send(self, dy: Tensor, slope: Tensor) -> None:
        """Leave them for the same pass."""
        self.sent = torch._C._current_graph_task_id(), dy, slope

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Return what was sent in this pass, once."""
        sent, self.sent = self.sent, None
        return None if sent is None or sent[0] != torch._C._current_graph_task_id() else sent[1:]


def can_fuse(layer: Any, x: Tensor) -> bool:
    """Whether a plugged batch norm with input-dependent gates may take `gated_batch_norm` for ``x``."""
    return (
        layer.fuse
        and layer.bias is not None
        and not torch.compiler.is_compiling()
        and x.device.type in DEVICES
        and x.dim() > 2
        and x.dtype == layer.weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and x.is_contiguous()
        and x.numel() > x.shape[0] * x.shape[1]  # more than one position, and an image at all
        and all(gate.of_mean for gate in layer.dynamic)
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()
        and torch.autograd.forward_ad._current_level < 0
    )


def gated_batch_norm(layer: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Batch norm and its input-dependent gates.

    Args:
        layer: a plugged batch norm; its running statistics are updated as in the stock layer.
        x: ``(B, C, *)``.
        weight: ``(C,)``, scaled by constant gates if there are any.
        bias: ``(C,)``, likewise.
    """
    of_batch = layer.training or layer.running_mean is None
    differentiable = torch.is_grad_enabled() and (x.requires_grad or layer.weight.requires_grad or gates_train(layer))
    link = Link()
    mean, var = Moments.apply(x, of_batch, link) if differentiable else moments(x, of_batch)
    if of_batch:
        mu, variance = statistics(layer, mean, var, x)
    else:  # copies: a later training step changes the buffers in place, perhaps before this backward pass
        mu, variance = layer.running_mean.clone(), layer.running_var.clone()
    slope = weight * (variance + layer.eps).rsqrt()  # (C,)
    descriptor = torch.addcmul(bias, mean - mu, slope)  # (B, C)
    scale, level = weight, bias
    for gate in layer.dynamic:
        h = gate.gates(descriptor).to(x.dtype)
        descriptor = descriptor * h  # the mean of what the next gate sees
        scale, level = scale * h, level * h  # (B, C)
    if not differentiable:
        return affine(x, mu, variance, scale, level, layer.eps)
    return Affine.apply(x, mean, mu, variance, scale, level, layer.eps, link)


def gates_train(layer: Any) -> bool:
    """Whether anything that the gates depend on requires gradients."""
    for gate in layer.dynamic:
        unit = getattr(gate.attention, 'unit', gate.attention)
        if any(p.requires_grad for p in unit.parameters()) or any(p.requires_grad for p in gate.parameters()):
            return True
    return False


def statistics(layer: Any, mean: Tensor, var: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Batch mean and biased variance ``(C,)`` from those of the samples ``(B, C)``; updates the running ones."""
    mu = mean.mean(0)
    variance = var.mean(0) + (mean - mu).square().mean(0)
    if layer.training and layer.track_running_stats and layer.running_mean is not None:
        with torch.no_grad():
            layer.num_batches_tracked.add_(1)
            factor = layer.momentum
            if factor is None:  # cumulative average
                factor = 1.0 / float(layer.num_batches_tracked)
            count = x.numel() // x.shape[1]
            layer.running_mean.lerp_(mu.detach().to(layer.running_mean.dtype), factor)
            layer.running_var.lerp_(variance.detach().to(layer.running_var.dtype) * (count / (count - 1)), factor)
    return mu, variance


def moments(x: Tensor, spread: bool) -> tuple[Tensor, Tensor | None]:
    """Mean and, on request, biased variance over the positions of each sample and channel: ``(B, C)`` each."""
    if not spread:
        return x.flatten(2).mean(-1), None
    mean, var = torch.batch_norm_update_stats(rows(x), None, None, 0.0)  # accumulates in float64, as batch norm does
    return mean.view(x.shape[:2]), var.view(x.shape[:2])


def affine(x: Tensor, mu: Tensor, var: Tensor, scale: Tensor, level: Tensor, eps: float = 0.0) -> Tensor:
    """Return ``(x - mu) / sqrt(var + eps) * scale + level`` in one pass, by the kernel of the stock layer in eval.

    Args:
        x: ``(B, C, *)``.
        mu: ``(C,)``, like ``var``.
        var: biased.
        scale: ``(B, C)``, like ``level``.
        level: added at the end.
        eps: of the batch norm.
    """
    mu, var = mu.expand_as(scale).flatten(), var.expand_as(scale).flatten()
    flat = torch.native_batch_norm(rows(x), scale.flatten(), level.flatten(), mu, var, False, 0.0, eps)[0]
    return torch.ops.aten._unsafe_view(flat, x.shape)  # not a view for autograd: what follows may write into it


def sums(dy: Tensor, x: Tensor, mu: Tensor, var: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """Sums over the positions of ``dy`` and of ``dy (x - mu) / sqrt(var + eps)``: ``(B, C)`` each, in one pass."""
    shape = x.shape[:2]
    mu, var = mu.expand(shape).flatten(), var.expand(shape).flatten()
    mask = [False, True, True]
    _, centred, total = NORM_BACKWARD(rows(dy), rows(x), None, mu, var, mu, var, False, eps, mask)
    return total.view(shape), centred.view(shape)


def rows(x: Tensor) -> Tensor:
    """View ``(B, C, *)`` as ``(1, B C, *)``: torch's batch norm kernels then work on each sample by itself."""
    return x.reshape(1, -1, *x.shape[2:])


def positions(x: Tensor) -> int:
    """Number of positions."""
    return x[0, 0].numel()


def spread_out(v: Tensor, x: Tensor) -> Tensor:
    """View ``(B, C)`` so that it broadcasts with ``x``."""
    return v.view(*v.shape, *(1,) * (x.dim() - 2))


class Moments(torch.autograd.Function):
    """`moments`; its backward pass makes the whole gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spread: bool, link: Link) -> tuple[Tensor, Tensor | None]:
        mean, var = moments(x, spread)
        ctx.save_for_backward(x, mean)
        ctx.link = link
        return mean, var

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor, d_var: Tensor | None) -> tuple[Tensor, None, None]:
        x, mean = ctx.saved_tensors
        n = positions(x)
        curve = None if d_var is None else d_var * (2 / n)
        shift = d_mean / n if curve is None else d_mean / n - curve * mean
        sent = ctx.link.take()
        if torch.is_grad_enabled() or sent is None:  # create_graph=True, or z has no part in this backward pass
            dx = spread_out(shift, x) if curve is None else spread_out(shift, x) + spread_out(curve, x) * x
            return dx.expand_as(x) if sent is None else dx + spread_out(sent[1], x) * sent[0], None, None
        dy, slope = sent
        dx = affine(dy, mean.new_zeros(()), mean.new_ones(()), slope, shift)
        if curve is not None:
            dx.addcmul_(x, spread_out(curve, x))
        return dx, None, None


class Affine(torch.autograd.Function):
    """`affine`. Its gradient of x is left to `Moments`, which always comes later: ``mean`` leads there."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, mu: Tensor, var: Tensor, scale: Tensor, level: Tensor, eps: float, link: Link
    ) -> Tensor:
        ctx.save_for_backward(x, mu, var, scale)
        ctx.eps, ctx.link = eps, link
        return affine(x, mu, var, scale, level, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mu, var, scale = ctx.saved_tensors
        rstd = (var + ctx.eps).rsqrt()
        if torch.is_grad_enabled():  # create_graph=True
            d_level = dy.flatten(2).sum(-1)
            d_scale = (dy * (x - spread_out(mu.expand_as(scale), x))).flatten(2).sum(-1) * rstd
        else:
            dy = dy.contiguous()
            d_level, d_scale = sums(dy, x, mu, var, ctx.eps)
        d_mean = d_mu = d_var = None
        moments_node = ctx.next_functions[1][0]
        if moments_node is not None and torch._C._will_engine_execute_node(moments_node):
            ctx.link.send(dy, scale * rstd)
            d_mean = torch.zeros_like(scale)
        if ctx.needs_input_grad[2]:
            d_mu = -(scale * d_level).sum(0) * rstd
            d_var = (scale * d_scale).sum(0) * rstd.square() * -0.5
        return None, d_mean, d_mu, d_var, d_scale, d_level, None, None
