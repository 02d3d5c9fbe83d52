"""Weights that several sites use: their gradients in one product at the end of a backward pass.

Autograd would compute the gradients of a shared linear layer at every site, ``dW += dy^T x`` and ``db += sum(dy)``, and
add them up: four operators a site. The rows dy and x of all sites stacked give the same sums in one product and one
sum:

    late = LateWeights(layers)             # at the first site; passed on to the next ones
    y = late.perceptron(0, x)              # layers[1](relu(layers[0](x))), at every site

The backward of `Perceptron` keeps rows, that of `Gather`, which runs after those of all sites, multiplies them. Where a
graph of the gradients is wanted, and under compiled autograd, each site gives its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['LateWeights']

Pairs = list[tuple[Tensor, Tensor]]  # dy and x of one site each


class LateWeights:
    """Weights and biases of linear layers, as one forward uses them.

    Args:
        layers: with biases.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.rows: dict[int, defaultdict[int, Pairs]] = {}  # backward pass -> number of a layer -> its rows
        self.tensors: tuple[Tensor, ...] = Gather.apply(self.rows, *(t for m in layers for t in (m.weight, m.bias)))

    def perceptron(self, first: int, x: Tensor | None) -> Tensor:
        """Layers ``first`` and ``first + 1`` with a ReLU between.

        Args:
            first: number of the first of the two.
            x: input ``(B, C)``; None is zeros, whose product is not computed: ``(1, C)``.
        """
        return Perceptron.apply(x, *self.tensors[2 * first : 2 * first + 4], self.rows, first)


class Gather(torch.autograd.Function):
    """Aliases of weights; the backward pass multiplies the rows that the sites have kept."""

    @staticmethod
    def forward(ctx: Any, rows: dict[int, defaultdict[int, Pairs]], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.rows = rows
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = list(grads)
        if torch.compiler.is_compiling():
            return None, *found
        for layer, pairs in ctx.rows.pop(torch._C._current_graph_task_id(), {}).items():
            dy, x = (one[0] if len(one) == 1 else torch.cat(one) for one in zip(*pairs, strict=True))
            if ctx.needs_input_grad[1 + 2 * layer]:
                found[2 * layer] = both(dy.t() @ x, found[2 * layer])
            if ctx.needs_input_grad[2 + 2 * layer]:
                found[2 * layer + 1] = both(dy.sum(0), found[2 * layer + 1])
        return None, *found


def both(one: Tensor, other: Tensor | None) -> Tensor:
    """Sum with the gradient that came directly, as the graph of a gradient sends it."""
    return one if other is None else one + other


class Perceptron(torch.autograd.Function):
    """Two linear layers with a ReLU between, see `LateWeights.perceptron`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, rows: Any, first: int
    ) -> Tensor:
        hidden = b1.relu()[None] if x is None else F.linear(x, w1, b1).relu_()
        ctx.save_for_backward(x, w1, b1, w2, b2, hidden)
        ctx.rows, ctx.first = rows, first
        return F.linear(hidden, w2, b2)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, b1, w2, b2, hidden = ctx.saved_tensors
        if x is None:
            x = w1.new_zeros(1, w1.shape[1])
        direct = torch.is_grad_enabled() or torch.compiler.is_compiling()  # create_graph=True, compiled autograd
        if direct:
            hidden = F.linear(x, w1, b1).relu()  # with its graph
        d_hidden = torch.ops.aten.threshold_backward(dy @ w2, hidden, 0)
        dx = d_hidden @ w1 if ctx.needs_input_grad[0] else None
        if direct:
            return dx, d_hidden.t() @ x, d_hidden.sum(0), dy.t() @ hidden, dy.sum(0), None, None
        gather = ctx.next_functions[1][0]
        if gather is not None and torch._C._will_engine_execute_node(gather):
            of_pass = ctx.rows.setdefault(torch._C._current_graph_task_id(), defaultdict(list))
            of_pass[ctx.first].append((d_hidden, x))
            of_pass[ctx.first + 1].append((dy, hidden))
        return dx, *(None,) * 6
