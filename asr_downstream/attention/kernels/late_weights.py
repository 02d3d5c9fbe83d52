"""Weights that several sites use: their gradients in one product at the end of a backward pass.

Autograd would compute the gradients of a shared linear layer at every site, ``dW += dy^T x`` and ``db += sum(dy)``, and
add them up: four operators a site. The rows dy and x of all sites stacked give the same sums in one product and one
sum. So the backward of a site `keep`s its rows, and that of `Gather`, which runs after those of all sites, multiplies
them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ['LateWeights']

Pairs = list[tuple[Tensor, Tensor]]  # dy and x of one site each
Rows = dict[int, defaultdict[int, Pairs]]  # backward pass -> number of a layer -> its rows


class LateWeights:
    """Weights and biases of linear layers, as one forward uses them.

    Args:
        layers: with biases.

    Attributes:
        rows: what the sites keep in a backward pass.
        tensors: weight and bias of each layer; outputs of `Gather`.
        dtype: of the weights.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.rows: Rows = {}
        self.tensors: tuple[Tensor, ...] = Gather.apply(self.rows, *(t for m in layers for t in (m.weight, m.bias)))
        self.dtype = self.tensors[0].dtype


def keep(rows: Rows, gather: Any, pairs: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Keep the rows of a site in its backward pass, if anyone asks for the gradients of the weights in that pass.

    Args:
        rows: of `LateWeights`.
        gather: node of its `Gather`; None: no weight is trained.
        pairs: number of a layer -> dy and x.
    """
    if gather is not None and torch._C._will_engine_execute_node(gather):
        of_pass = rows.setdefault(torch._C._current_graph_task_id(), defaultdict(list))
        for layer, pair in pairs.items():
            of_pass[layer].append(pair)


class Gather(torch.autograd.Function):
    """Aliases of weights; the backward pass multiplies the rows that the sites have kept."""

    @staticmethod
    def forward(ctx: Any, rows: Rows, *tensors: Tensor) -> tuple[Tensor, ...]:
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
