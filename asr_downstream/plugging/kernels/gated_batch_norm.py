"""Batch norm, descriptor, gate and scale as one affine of each sample: input-dependent gates without a map to keep.

Plain form: y = BN(x), h = gate(mean(y)), z = y h. It reads the map twice more than BN does and keeps y for the backward
pass. But pooling commutes with an affine: with m the mean of each sample and channel, mu and r the mean and reciprocal
standard deviation of the batch norm,

    d = (m - mu) r gamma + beta                    the descriptor, mean(BN(x)) without BN(x)
    z = (x - mu) r (gamma h) + beta h              one affine a sample and channel

Forward: one pass for the moments of each sample, from which the batch statistics follow, and one for the affine.
Backward: with S0 and S1 the sums of dz and of dz (x - mu) r over the positions, one pass for these, and

    c0 = gamma / N  sum_b(h S0 + dd),   c1 = gamma / N  sum_b(h S1 + dd (m - mu) r)      both 0 with running statistics
    dx = r (gamma h dz + gamma dd / n - c0 - (x - mu) r c1)          n positions, N = B n

one more; x is all that is kept, as in BN. The gate itself is ordinary autograd between two functions: it is
differentiated, shared, compiled and checkpointed as always.

This form is that of ``memory='low'``, with gradients, and gives what the plain form gives: batch norm (training, eval,
frozen) on contiguous maps on the CPU, in one precision, before attentions whose gates depend on the mean alone.
Elsewhere the plain form runs: other layers and devices, channels_last, autocast, SyncBN while it synchronises,
torch.compile (which fuses by itself), torch.func transforms, forward-mode derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from asr_downstream.attention.kernels.functions import eager
from asr_downstream.plugging.kernels.memory import low_memory

__all__ = ['can_fuse', 'fusible', 'gated_batch_norm']

DEVICES = ('cpu',)  # where it was measured
NORM_BACKWARD = torch.ops.aten.native_batch_norm_backward


class Norm(NamedTuple):
    """Statistics that a map was normalised with, and how to get them again.

    Attributes:
        mu: mean, ``(C,)``.
        var: biased variance, ``(C,)``.
        eps: added to it.
        of_batch: they are those of the batch.
    """

    mu: Tensor
    var: Tensor
    eps: float
    of_batch: bool

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The batch norm by torch."""
        mu, var = (None, None) if self.of_batch else (self.mu, self.var)
        return F.batch_norm(x, mu, var, weight, bias, self.of_batch, 0.0, self.eps)


class Link:
    """The statistics of one forward, and the gradients that `Affine` hands to `Descriptor` in a backward pass.

    Attributes:
        norm: what the map is normalised with.
        mean: of each sample and channel, ``(B, C)``.
        mu: ``norm.mu`` for every sample, ``(B C,)``.
        var: ``norm.var`` likewise.
    """

    def __init__(self, norm: Norm, mean: Tensor) -> None:
        self.norm = norm
        self.mean = mean
        self.mu, self.var = norm.mu.repeat(len(mean)), norm.var.repeat(len(mean))
        self.sent: tuple[int, tuple[Tensor, ...]] | None = None

    def send(self, *tensors: Tensor) -> None:
        """Keep tensors for `take` in the same backward pass."""
        self.sent = torch._C._current_graph_task_id(), tensors

    def take(self) -> tuple[Tensor, ...] | None:
        """Return what was sent in this pass, once."""
        sent, self.sent = self.sent, None
        return None if sent is None or sent[0] != torch._C._current_graph_task_id() else sent[1]

    def affine(self, x: Tensor, scale: Tensor, level: Tensor) -> Tensor:
        """Return ``(x - mu) r scale + level`` in one pass, by the kernel of the stock layer in eval.

        Args:
            x: ``(B, C, *)``.
            scale: ``(B, C)``, like ``level``.
            level: added at the end.
        """
        return scaled(x, self.mu, self.var, scale, level, self.norm.eps)

    def sums(self, dz: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Sums S0 and S1 over the positions of ``dz`` and of ``dz (x - mu) r``: ``(B, C)`` each, in one pass."""
        mu, var, mask = self.mu, self.var, [False, True, True]
        _, s1, s0 = NORM_BACKWARD(rows(dz), rows(x), None, mu, var, mu, var, False, self.norm.eps, mask)
        return s0.view(x.shape[:2]), s1.view(x.shape[:2])


def can_fuse(layer: Any, x: Tensor) -> bool:
    """Whether a plugged batch norm with input-dependent gates may take `gated_batch_norm` for ``x``."""
    return (
        low_memory(layer)
        and fusible(layer)
        and eager()
        and x.dim() > 2
        and x.dtype == layer.weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and x.is_contiguous()
        and x.numel() > x.shape[0] * x.shape[1]  # more than one position, and an image at all
    )


def fusible(layer: Any) -> bool:
    """Whether there is a fused form of a plugged batch norm with input-dependent gates, on its device."""
    return layer.bias is not None and layer.bias.device.type in DEVICES and all(gate.of_mean for gate in layer.dynamic)


def gated_batch_norm(layer: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Batch norm and its input-dependent gates.

    Args:
        layer: a plugged batch norm; its running statistics are updated as in the stock layer.
        x: ``(B, C, *)``.
        weight: ``(C,)``, scaled by constant gates if there are any.
        bias: ``(C,)``, likewise.
    """
    with torch.no_grad():
        mean, norm = statistics(layer, x.detach())
    link = Link(norm, mean)
    descriptor: Tensor = Descriptor.apply(x, weight, bias, link)
    level, gates = descriptor, None
    for gate in layer.dynamic:
        h = gate.gates(level).to(x.dtype)
        level = level * h  # the mean of what the next gate sees
        gates = h if gates is None else gates * h
    return Affine.apply(x, descriptor, gates, weight, bias, link)


def statistics(layer: Any, x: Tensor) -> tuple[Tensor, Norm]:
    """Mean of each sample and channel ``(B, C)``, and the statistics to normalise with; updates the running ones."""
    if not layer.training and layer.running_mean is not None:
        # Copies: a later training step changes the buffers in place, perhaps before this backward pass.
        return x.flatten(2).mean(-1), Norm(layer.running_mean.clone(), layer.running_var.clone(), layer.eps, False)
    mean, var = torch.batch_norm_update_stats(rows(x), None, None, 0.0)  # accumulates in float64, as batch norm does
    mean = mean.view(x.shape[:2])
    mu = mean.mean(0)
    variance = var.view(x.shape[:2]).mean(0).add_((mean - mu).square_().mean(0))
    if layer.training and layer.track_running_stats and layer.running_mean is not None:
        layer.num_batches_tracked.add_(1)
        factor = layer.momentum
        if factor is None:  # cumulative average
            factor = 1.0 / float(layer.num_batches_tracked)
        count = x.numel() // x.shape[1]
        layer.running_mean.lerp_(mu.to(layer.running_mean.dtype), factor)
        layer.running_var.lerp_(variance.to(layer.running_var.dtype) * (count / (count - 1)), factor)
    return mean, Norm(mu, variance, layer.eps, True)


def scaled(x: Tensor, mu: Tensor, var: Tensor, scale: Tensor, level: Tensor, eps: float = 0.0) -> Tensor:
    """See `Link.affine`."""
    flat = torch.native_batch_norm(rows(x), scale.flatten(), level.flatten(), mu, var, False, 0.0, eps)[0]
    return torch.ops.aten._unsafe_view(flat, x.shape)  # not a view for autograd: what follows may write into it


def rows(x: Tensor) -> Tensor:
    """View ``(B, C, *)`` as ``(1, B C, *)``: torch's batch norm kernels then work on each sample by itself."""
    return x.reshape(1, -1, *x.shape[2:])


class Descriptor(torch.autograd.Function):
    """The descriptor d; its backward pass makes the whole gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, link: Link) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.link = link
        mu, var, eps, _ = link.norm
        return torch.addcmul(bias, link.mean - mu, (var + eps).rsqrt_().mul_(weight))

    @staticmethod
    def backward(ctx: Any, dd: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        norm: Norm = ctx.link.norm
        if torch.is_grad_enabled():  # create_graph=True

            def descriptor(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                return norm.plain(x, weight, bias).flatten(2).mean(-1)

            return *derivatives(descriptor, (x, weight, bias), dd), None
        r = (norm.var + norm.eps).rsqrt_()
        d_weight, d_bias = (ctx.link.mean - norm.mu).mul_(r).mul_(dd).sum(0), dd.sum(0)
        sent = ctx.link.take()
        if sent is not None:  # what z gives to weight and bias comes along
            d_weight += sent[2]
            d_bias += sent[3]
        if not ctx.needs_input_grad[0]:
            return None, d_weight, d_bias, None
        slope = weight * r
        positions = x[0, 0].numel()
        shift = dd * (slope / positions)
        curve = None
        if norm.of_batch:
            share = slope / (x.shape[0] * positions)
            curve = (d_weight * share).mul_(r).neg_()
            shift -= torch.addcmul(d_bias * share, curve, norm.mu)
        if sent is None:  # z has no part in this backward pass
            dx = spread(shift, x).expand_as(x)
            return dx if curve is None else dx + spread(curve[None], x) * x, d_weight, d_bias, None
        dz, h = sent[:2]
        dx = scaled(dz, torch.zeros_like(ctx.link.mu), torch.ones_like(ctx.link.var), h * slope, shift)
        if curve is not None:
            dx.addcmul_(x, spread(curve[None], x))
        return dx, d_weight, d_bias, None


class Affine(torch.autograd.Function):
    """The gated map z. `Descriptor` computes the gradient of x, since its backward runs after that of this one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, descriptor: Tensor, h: Tensor, weight: Tensor, bias: Tensor, link: Link
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, h, weight, bias)
        ctx.link = link
        return link.affine(x, weight * h, bias * h)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        x, h, weight, bias = ctx.saved_tensors
        norm: Norm = ctx.link.norm
        if torch.is_grad_enabled():  # create_graph=True

            def gated(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                return norm.plain(x, weight, bias) * spread(h, x)

            dx, *others = derivatives(gated, (x, h, weight, bias), dz)
            return dx, None, *others, None
        dz = dz.contiguous()
        s0, s1 = ctx.link.sums(dz, x)
        dh = (s1 * weight).addcmul_(s0, bias)
        d_weight, d_bias = s1.mul_(h).sum(0), s0.mul_(h).sum(0)
        node = ctx.next_functions[1][0]
        if node is None or not torch._C._will_engine_execute_node(node):
            return None, None, dh, d_weight, d_bias, None
        ctx.link.send(dz, h, d_weight, d_bias)
        # Zeros, so that it comes later even if no gate leads there.
        return None, torch.zeros_like(h), dh, None, None, None


def derivatives(f: Callable[..., Tensor], inputs: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of ``inputs`` under ``f``, by torch's functions and with graphs of their own; None where unwanted."""
    aliases = [t.view_as(t) for t in inputs]  # of each only what goes through f: gates depend on the map as well
    wanted = [t for t in aliases if t.requires_grad]
    found = iter(torch.autograd.grad(f(*aliases), wanted, dy, create_graph=True))
    return tuple(next(found) if t.requires_grad else None for t in aliases)


def spread(v: Tensor, x: Tensor) -> Tensor:
    """View ``(B, C)`` so that it broadcasts with ``x``."""
    return v.view(*v.shape, *(1,) * (x.dim() - 2))
