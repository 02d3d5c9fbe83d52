"""Constant gates of many sites in a few operators: parameters are stacked by one copy, and scaled in lists.

`gather` stacks the parameters of the sites of a group, `scaled` hands each site its gates, and the parameters of its
layer times them. Between the two lies ordinary autograd. Both are functions of their own for the sake of sites that a
forward did not use: these get no gradient (None, as without a bank, and not zeros, which an optimiser with momentum or
weight decay would take for a step), although everything hangs on one node.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from asr_downstream.modules.affine import Constants
from asr_downstream.plugging.gating.shelf import Ready

__all__ = ['Marks', 'gather', 'scaled', 'with_inputs']


class Marks:
    """Which sites of a group the backward pass has met."""

    def __init__(self) -> None:
        self.task = -1
        self.met: set[int] = set()

    def add(self, numbers: Iterable[int]) -> None:
        """The gradient of these sites has come; more may come in the same backward pass."""
        task = torch._C._current_graph_task_id()
        if task != self.task:
            self.task, self.met = task, set()
        self.met |= set(numbers)

    def used(self, number: int, chained: bool) -> bool:
        """Whether a site has a gradient in this backward pass; True if nothing is known of it.

        Args:
            number: of the site.
            chained: a state runs along the sites, so those before a site that was used count as used too.
        """
        if self.task != torch._C._current_graph_task_id():
            return True
        return number <= max(self.met, default=-1) if chained else number in self.met


def gather(parameters: Sequence[Sequence[Tensor]], marks: Marks, chained: bool = False) -> list[Tensor]:
    """Stack parameters of the sites of a group.

    Args:
        parameters: of each site the same number, of the same shapes.
        marks: of the group.
        chained: see `Marks.used`.

    Returns:
        One stack ``(sites, *shape)`` a parameter.
    """
    by_name = list(zip(*parameters, strict=True))
    return list(Gather.apply(marks, chained, len(parameters), *(p for same in by_name for p in same)))


class Gather(torch.autograd.Function):
    """Stacks of one concatenation; the gradients are views of those of the stacks."""

    @staticmethod
    def forward(ctx: Any, marks: Marks, chained: bool, sites: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.marks, ctx.chained, ctx.sites = marks, chained, sites
        shapes = [p.shape for p in parameters[::sites]]
        flat = torch.cat([p.reshape(-1) for p in parameters])
        pieces = flat.split([sites * shape.numel() for shape in shapes])
        return tuple(piece.view(sites, *shape) for piece, shape in zip(pieces, shapes, strict=True))

    @staticmethod
    def backward(ctx: Any, *stacks: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = []
        used = [ctx.marks.used(number, ctx.chained) for number in range(ctx.sites)]
        for stack in stacks:
            # In the layout of the parameters, or each would be copied into it; a line has none, for axes of 1 either.
            rows = [None] * ctx.sites if stack is None else stack.reshape(-1).view(stack.shape).unbind()
            found += [row if met else None for row, met in zip(rows, used, strict=True)]
        return None, None, None, *found


def scaled(
    v: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    shifts: Sequence[Tensor | None],
    marks: Marks,
) -> list[Ready]:
    """Hand every site of a group its gates, and the parameters that are given times them.

    Args:
        v: gates ``(sites, C)``.
        weights: of each site, ``(C,)``; None where it is not to be scaled here.
        biases: likewise.
        shifts: what is added to the outputs; all None, or none is.
        marks: of the group.
    """
    sides = [[number for number, t in enumerate(side) if t is not None] for side in (weights, biases)]
    added = [shift for shift, bias in zip(shifts, biases, strict=True) if shift is not None and bias is not None]
    found = Scaled.apply(marks, sides, len(added), v, *(t for t in (*weights, *biases) if t is not None), *added)
    rows, products = found[: len(weights)], iter(found[len(weights) :])
    of_weight, of_bias = [{number: next(products) for number in side} for side in sides]
    return [
        Ready(Constants(row, shift), of_weight.get(number), of_bias.get(number))
        for number, (row, shift) in enumerate(zip(rows, shifts, strict=True))
    ]


def with_inputs(ready: Sequence[Ready], u: Tensor, marks: Marks) -> list[Ready]:
    """Hand every site of a group the gates of its inputs ``u`` ``(sites, C_in)`` as well."""
    rows = Scaled.apply(marks, [[], []], 0, u)
    return [r._replace(constants=r.constants._replace(inputs=row)) for r, row in zip(ready, rows, strict=True)]


class Scaled(torch.autograd.Function):
    """Gates of the sites and parameters times gates: one operator over lists, and a few more in the backward pass.

    With shifts, of which each bias then has one, it is one more.
    """

    @staticmethod
    def forward(
        ctx: Any, marks: Marks, sides: list[list[int]], shifts: int, v: Tensor, *given: Tensor
    ) -> tuple[Tensor, ...]:  # fmt: skip
        given, added = given[: len(given) - shifts], given[len(given) - shifts :]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(v, *given)
        ctx.marks, ctx.sides, ctx.shifts = marks, sides, shifts
        rows = v.unbind()
        factors = [rows[site] for side in sides for site in side]
        plain = len(given) - shifts
        products = times(given[:plain], factors[:plain])
        shifted = torch._foreach_addcmul(added, given[plain:], factors[plain:]) if shifts else ()
        return (*(row.view_as(row) for row in rows), *products, *shifted)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        v, *given = ctx.saved_tensors
        rows, dy = v.unbind(), grads[len(v) :]
        terms = {site: grad for site, grad in enumerate(grads[: len(v)]) if grad is not None}  # of the gradient of v
        start = 0
        for side in ctx.sides:
            met = [(site, n) for n, site in enumerate(side, start) if dy[n] is not None]
            add(terms, [site for site, _ in met], [dy[n] for _, n in met], [given[n] for _, n in met])
            start += len(side)
        ctx.marks.add(terms)
        sites = [site for side in ctx.sides for site in side]
        trained = [n for n, grad in enumerate(dy) if grad is not None and ctx.needs_input_grad[4 + n]]
        found = dict(zip(trained, times([dy[n] for n in trained], [rows[sites[n]] for n in trained]), strict=True))
        dv = stack([terms.get(site) for site in range(len(v))], v) if ctx.needs_input_grad[3] else None
        return None, None, None, dv, *(found.get(n) for n in range(len(given))), *dy[len(dy) - ctx.shifts :]


def times(a: Sequence[Any], b: Sequence[Any]) -> Sequence[Tensor]:
    """Products of two lists, pair by pair."""
    return torch._foreach_mul(list(a), list(b)) if a else ()


def add(terms: dict[int, Tensor], keys: list[int], a: list[Any], b: list[Any]) -> None:
    """Add products, pair by pair, to the terms of their keys."""
    pairs = list(zip(keys, a, b, strict=True))
    first, more = [[p for p in pairs if (p[0] in terms) is later] for later in (False, True)]
    terms.update(zip((p[0] for p in first), times([p[1] for p in first], [p[2] for p in first]), strict=True))
    if more:
        sums = torch._foreach_addcmul([terms[p[0]] for p in more], [p[1] for p in more], [p[2] for p in more])
        terms.update(zip((p[0] for p in more), sums, strict=True))


def stack(rows: list[Tensor | None], like: Tensor) -> Tensor | None:
    """Rows as one tensor, zeros for those that are missing; None if all are."""
    if all(row is None for row in rows):
        return None
    if any(row is None for row in rows):
        zeros = like.new_zeros(like.shape[1:])
        rows = [zeros if row is None else row for row in rows]
    return torch.stack(rows)  # type: ignore[arg-type]
