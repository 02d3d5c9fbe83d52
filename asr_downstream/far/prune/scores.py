"""Global structural pruning of hidden units: regulariser, one threshold for all, masked model, smaller model.

A unit belongs to one direction of one head of one attention. Its group of weights is its four gate rows of ``W_ih`` and
``W_hh`` and its column of ``W_hh``'s four gate blocks. A removed unit loses its biases and its column of the projection
as well: with biases left it would go on emitting a signal (the authors' code leaves them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from asr_downstream.errors import AsrError
from asr_downstream.far.model.describe import Description, check_replaced, describe, mixers
from asr_downstream.far.model.head import Direction, HeadLSTM
from asr_downstream.far.model.lstm import MultiHeadLSTM, linear

__all__ = [
    'Groups',
    'check_units',
    'group_norms',
    'hoyer_square',
    'mask_units',
    'scores',
    'shrink',
    'smallest_within',
    'units_above',
]

EPS = 1e-6
Unit = tuple[str, int, bool]  # path of the attention, head, whether the direction is the backward one
Groups = dict[Unit, Tensor]


def lstms(model: nn.Module) -> Iterator[tuple[str, MultiHeadLSTM]]:
    """The LSTMs of a model with the paths of the attentions they stand in for.

    Raises:
        AsrError: what stands there is no LSTM.
    """
    for path, mixer in mixers(model):
        if not isinstance(mixer, MultiHeadLSTM):
            raise AsrError(f"{path}: mixer={mixer.name!r} has no hidden units to prune; use mixer='lstm', or hoyer=0")
        yield path, mixer


def check_units(model: nn.Module) -> None:
    """Refuse a model that has no hidden units; see `lstms`."""
    for _ in lstms(model):
        pass


def directions(model: nn.Module) -> Iterator[tuple[Unit, Direction]]:
    """Directions of all heads of a model."""
    for path, mixer in lstms(model):
        for number, head in enumerate(mixer.heads):
            for direction in head.directions:  # type: ignore[union-attr]
                yield (path, number, direction.reverse), direction


def group_norms(model: nn.Module) -> Groups:
    """L2 norm of the group of weights of each unit, ``(width,)`` a direction; differentiable."""
    return {unit: norms_of(direction) for unit, direction in directions(model)}


def norms_of(direction: Direction) -> Tensor:
    """L2 norms ``(width,)`` of one direction."""
    width = direction.width
    rows = direction.weight_ih.unflatten(0, (4, width)).square().sum((0, 2))
    recurrent = direction.weight_hh.unflatten(0, (4, width)).square()
    own = recurrent.diagonal(dim1=1, dim2=2).sum(0)  # in the row and in the column of a unit: counted once
    squares = rows + recurrent.sum((0, 2)) + recurrent.sum((0, 1)) - own
    return (squares + 1e-24).sqrt()


def hoyer_square(model: nn.Module) -> Tensor:
    """Hoyer-square regulariser of unit groups: sum over heads and directions of ``(sum ||g||)^2 / sum ||g||^2``.

    Of ``width`` equal norms it is ``width``, of a single one that is not zero, 1 (DeepHoyer, ICLR 2020).
    """
    terms = [norms.sum().square() / (norms.square().sum() + EPS) for norms in group_norms(model).values()]
    return torch.stack(terms).sum()


def scores(model: nn.Module, relative: bool = True) -> Groups:
    """What the threshold is compared with: the norm of a unit's group, over the largest of its head and direction.

    Args:
        model: with replaced attentions.
        relative: False: the norm itself.
    """
    with torch.no_grad():
        found = {unit: norms.detach().clone() for unit, norms in group_norms(model).items()}
    return {unit: norms / norms.max().clamp(min=EPS) for unit, norms in found.items()} if relative else found


def units_above(found: Groups, threshold: float) -> Groups:
    """Which units stay, as boolean ``(width,)`` a direction."""
    return {unit: values >= threshold for unit, values in found.items()}


def smallest_within(
    found: Groups, cost: Callable[[Groups], float], budget: float, steps: int = 40
) -> tuple[float, Groups]:
    """Lowest threshold whose units cost at most ``budget``.

    Args:
        found: scores of the units.
        cost: of the units that stay; must not grow when units are removed.
        budget: in units of the cost.
        steps: most evaluations of the cost.

    Returns:
        The threshold, and which units stay.

    Raises:
        AsrError: even with the largest units alone it costs more.
    """
    values = torch.cat([v.flatten() for v in found.values()]).sort().values.unique()
    candidates = [0.0, *values.tolist()]  # the last one keeps the largest units
    if cost(units_above(found, candidates[0])) <= budget:
        return candidates[0], units_above(found, candidates[0])
    if (least := cost(units_above(found, candidates[-1]))) > budget:
        raise AsrError(f'budget {budget:g}: cannot be met by removing hidden units; the least is {least:.3g}')
    low, high = 0, len(candidates) - 1
    for _ in range(steps):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        if cost(units_above(found, candidates[middle])) <= budget:
            high = middle
        else:
            low = middle
    return candidates[high], units_above(found, candidates[high])


@torch.no_grad()
def mask_units(model: nn.Module, kept: Groups) -> None:
    """Set everything of the other units to zero, in place: weights, biases, columns of the projection."""
    for unit, direction in directions(model):
        stays = kept[unit].to(direction.weight_hh.device)
        rows = stays.repeat(4)
        direction.weight_ih[~rows] = 0
        direction.weight_hh[~rows] = 0
        direction.weight_hh[:, ~stays] = 0
        direction.bias_ih[~rows] = 0
        direction.bias_hh[~rows] = 0
    for path, mixer in lstms(model):
        for weight, columns in zip(projections(mixer), columns_of(path, mixer, kept), strict=True):
            weight[:, ~columns.to(weight.device)] = 0


@torch.no_grad()
def shrink(model: Any, kept: Groups) -> Description:
    """Take the other units out of the LSTMs, in place; the model equals the masked one.

    Returns:
        The table of the replacements. The widths are added to ``model.replace_spec``.
    """
    check_replaced(model)
    widths = {}
    for path, mixer in lstms(model):
        columns = columns_of(path, mixer, kept)
        for number, head in enumerate(list(mixer.heads)):
            mixer.heads[number] = smaller(head, *(kept.get((path, number, back)) for back in (False, True)))  # type: ignore[arg-type]
        if mixer.head_proj is None:
            mixer.out_proj = fewer_inputs(mixer.out_proj, columns[0])  # type: ignore[arg-type]
        else:
            for number, stay in enumerate(columns):
                mixer.head_proj[number] = fewer_inputs(mixer.head_proj[number], stay)  # type: ignore[arg-type]
        widths[path] = [list(pair) for pair in mixer.widths]
    model.replace_spec = {**model.replace_spec, 'widths': widths}
    return describe(model)


def projections(mixer: MultiHeadLSTM) -> list[Tensor]:
    """Weights that read the states of heads: one a head, or one for all."""
    if mixer.head_proj is None:
        return [mixer.out_proj.weight]  # type: ignore[union-attr]
    return [layer.weight for layer in mixer.head_proj]  # type: ignore[misc]


def columns_of(path: str, mixer: MultiHeadLSTM, kept: Groups) -> list[Tensor]:
    """Which columns of each of `projections` stay."""
    empty = torch.zeros(0, dtype=torch.bool)
    a_head = [
        torch.cat([kept.get((path, number, back), empty).cpu() for back in (False, True)])
        for number in range(len(mixer.heads))
    ]
    return a_head if mixer.head_proj is not None else [torch.cat(a_head)]


def smaller(head: HeadLSTM, ahead: Tensor | None, back: Tensor | None) -> HeadLSTM:
    """A head with only the units that stay."""
    stays = {False: ahead, True: back}
    widths = [0 if s is None else int(s.sum()) for s in (ahead, back)]
    found = HeadLSTM(head.inputs, widths, bound=0.0)
    example = next(head.parameters(), None)
    if example is not None:
        found.to(example.device, example.dtype)
    old = {direction.reverse: direction for direction in head.directions}
    for new in found.directions:
        units = stays[new.reverse]
        assert units is not None
        before, rows = old[new.reverse], units.repeat(4).to(new.weight_hh.device)
        new.weight_ih.copy_(before.weight_ih[rows])
        new.weight_hh.copy_(before.weight_hh[rows][:, units.to(rows.device)])
        new.bias_ih.copy_(before.bias_ih[rows])
        new.bias_hh.copy_(before.bias_hh[rows])
    for parameter, like in zip(found.parameters(), head.parameters(), strict=False):
        parameter.requires_grad_(like.requires_grad)
    return found


def fewer_inputs(layer: nn.Linear, stay: Tensor) -> nn.Linear:
    """A linear layer without some of its inputs."""
    weight = layer.weight
    found = linear(int(stay.sum()), layer.out_features).to(weight.device, weight.dtype)
    found.weight.copy_(weight[:, stay.to(weight.device)])
    found.bias.copy_(layer.bias)
    return found.requires_grad_(weight.requires_grad)
