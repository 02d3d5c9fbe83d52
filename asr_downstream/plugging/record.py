"""`record`: the gates and states of a plugged model in its forwards, on real data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from asr_downstream.console.text import Printed
from asr_downstream.modules.check import check_module
from asr_downstream.plugging.gating.gates import Gate
from asr_downstream.plugging.gating.recurrence import Place, Slot
from asr_downstream.plugging.gating.sides import INPUT
from asr_downstream.plugging.layers import Plugged

__all__ = ['Recording', 'record']


@dataclass(repr=False)
class Recording(Printed):
    """Of each site, by path, one entry a forward through it; tensors are detached. Prints as a table.

    Attributes:
        gates: what the map was multiplied by, ``(B, C)``, or ``(B, C, *)`` from a spatial attention; the product where
            a site has several input-dependent gates; constant gates are ``(1, C)``. Shifts are no gates.
        inputs: likewise, of the sites with gates of their inputs (``side='input'``), ``(1, C_in)``.
        states: of a recurrent attention, after the site, such as ``(h, c)``, each ``(B, C)``.
    """

    gates: dict[str, list[Tensor]] = field(default_factory=dict)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    states: dict[str, list[Any]] = field(default_factory=dict)

    def parts(self) -> list[Table | str]:
        table = Table('site', 'forwards', 'last gates', 'smallest', 'mean', 'largest', 'states', title='recorded gates')
        for column in table.columns[1:]:
            column.justify = 'right'
        rows = [*self.gates.items(), *((f'{path} (input)', gates) for path, gates in self.inputs.items())]
        for path, gates in rows:
            numbers = ['', '', '', '']
            if gates:
                v = torch.cat([g.flatten() for g in gates]).float()
                numbers = [str(tuple(gates[-1].shape)), *(f'{float(x):.4f}' for x in (v.min(), v.mean(), v.max()))]
            states = str(len(self.states[path])) if path in self.states else ''
            table.add_row(path, str(len(gates)), *numbers, states)
        return [table]


@contextmanager
def record(model: nn.Module, constant: bool = True) -> Iterator[Recording]:
    """Record the gates and states of all forwards inside, in one thread.

    Where a site has constant and input-dependent gates, the input-dependent ones are recorded.

        with record(model) as seen:
            model(images)
        seen.gates['layer1.0.bn3'][0]  # (B, C)

    Args:
        model: plugged.
        constant: whether to record constant gates too. A site whose gates are watched computes them itself: the same
            numbers to rounding, but not to the bit.
    """
    check_module(model, 'record')
    found = Recording()
    handles = []
    places: dict[tuple[int, int, int], str] = {}
    watched: set[Slot] = set()
    for path, layer in model.named_modules():
        if not isinstance(layer, Plugged):
            continue
        fixed = list(layer.gate or ()) if constant else []  # type: ignore[attr-defined]
        inputs = [gate for gate in fixed if gate.side == INPUT]
        outputs = list(layer.dynamic or ()) or [gate for gate in fixed if gate.side != INPUT]  # type: ignore[attr-defined]
        for gates, kept in ((outputs, found.gates), (inputs, found.inputs)):
            for number, gate in enumerate(gates):
                of_site = kept.setdefault(path, [])
                handles.append(gate.attention.register_forward_hook(keeper(of_site, gate, number == 0)))
                if (place := gate.site_attention.place) is not None:
                    found.states[path] = []
                    places[spot(place)] = path
                    watched.add(place.slot)

    def watch(place: Place, state: Any) -> None:
        if spot(place) in places:
            found.states[places[spot(place)]].append(tuple(t.detach() for t in state if isinstance(t, Tensor)))

    for slot in watched:
        slot.watchers += (watch,)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for slot in watched:
            slot.watchers = tuple(w for w in slot.watchers if w is not watch)


def spot(place: Place) -> tuple[int, int, int]:
    """Key of a place."""
    return id(place.slot), place.run, place.position


def keeper(kept: list[Tensor], gate: Gate, first: bool) -> Any:
    """Forward hook of the attention of ``gate``: keeps its gates, multiplied by those of the gates before."""

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if module is not gate.attention:  # of a copy of the model, which has taken this hook along
            return
        v = output.detach()
        if gate.reference is not None:
            v = v / spread(gate.reference, v.dim())
        if not first:
            before = kept.pop()
            dims = max(before.dim(), v.dim())
            v = spread(before, dims) * spread(v, dims)
        kept.append(v)

    return keep


def spread(v: Tensor, dims: int) -> Tensor:
    """Add axes of one position until ``v`` has ``dims`` axes."""
    return v.view(*v.shape, *(1,) * (dims - v.dim()))
