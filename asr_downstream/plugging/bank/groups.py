"""Groups of sites whose constant gates are computed together, see `asr_downstream.plugging.bank.hooks`.

A group is a plan: the sites, and where their parameters lie. It reads the parameters anew in every forward (training,
``functional_call`` and swapped weights change them), and says by itself when the plan is out of date.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from asr_downstream.plugging.bank.alike import Form, Forms, batched_form, hooked, links, signature
from asr_downstream.plugging.bank.batched_gates import Marks, gather, scaled
from asr_downstream.plugging.bank.shared_form import shared_form
from asr_downstream.plugging.gating.gates import ConstantGate
from asr_downstream.plugging.gating.shelf import Ready
from asr_downstream.plugging.gating.site_attention import Member

__all__ = ['Group', 'groups_of']

LONGEST = 12  # sites of a group
PLAIN = (nn.Parameter, Tensor)


class Column:
    """One gate of each site of a group.

    Args:
        gates: in the order of the sites.
        form: computes them together.
    """

    def __init__(self, gates: list[ConstantGate], form: Form) -> None:
        self.gates = gates
        self.form = form
        self.names: list[str] = list(form.names)
        self.places = [
            [*([(gate._parameters, 'psi')] if gate.psi is not None else []), *form.places(gate)] for gate in gates
        ]
        self.modules = [m for gate in gates for m in gate.modules()] + form.modules()
        self.links = list(links(self.modules))
        self.references = gates[0].reference is not None

    def parameters(self) -> list[list[Any]]:
        """Those of each site, psi first if there is one; None where a name is gone."""
        return [[held.get(name) for held, name in of_site] for of_site in self.places]

    def state(self) -> list[Any]:
        """What the plan depends on in parameters: kind, precision, place and shape."""
        return [
            None if p is None else (type(p) in PLAIN, p.dtype, p.device, p.shape)
            for of_site in (*self.parameters(), self.form.shared())
            for p in of_site
        ]

    def stands(self) -> bool:
        """Whether the modules are those that the plan was made for."""
        return all(held.get(key) is value for held, key, value in self.links) and all(
            (gate._buffers['reference'] is not None) is self.references for gate in self.gates
        )

    def gates_of(self, parameters: list[list[Tensor]], marks: Marks) -> Tensor:
        """The gates ``(sites, C)``, before they are divided by the references."""
        stacks = gather(parameters, marks, self.form.chained)
        psi = stacks.pop(0) if self.gates[0].psi is not None else None
        return self.form(self.gates, dict(zip(self.names, stacks, strict=True)), psi)


class Group:
    """Sites that are alike.

    Args:
        layers: plugged, in the order of the model.
        columns: of their gates.
    """

    def __init__(self, layers: list[Any], columns: list[Column]) -> None:
        self.layers = layers
        self.columns = columns
        self.state = [column.state() for column in columns]
        self.able = all(able(state) for state in self.state) and all(c.form.covers(c.gates) for c in columns)

    def stands(self) -> bool:
        """Whether the plan is still right: modules, and kind, precision, place and shape of the parameters."""
        return all(
            column.stands() and column.state() == state for column, state in zip(self.columns, self.state, strict=True)
        )

    def ready(self) -> dict[nn.Module, Ready]:
        """The gates of the sites, and what they scale; empty if the sites are to compute their own."""
        if not self.able or any(hooked(column.modules) or column.form.watched() for column in self.columns):
            return {}
        marks = Marks()
        v = self.product(marks)
        weights = [scalable(layer, 'weight', v) for layer in self.layers]
        biases = [scalable(layer, 'bias', v) for layer in self.layers]
        return dict(zip(self.layers, scaled(v, weights, biases, marks), strict=True))

    def product(self, marks: Marks) -> Tensor:
        """The product of the columns, ``(sites, C)``."""
        v: Tensor | None = None
        for column in self.columns:
            gates = self.column_gates(column, marks)
            if column.references:
                gates = gates / torch.cat([gate.reference for gate in column.gates])  # type: ignore[misc]
            v = gates if v is None else v * gates
        assert v is not None
        return v

    def column_gates(self, column: Column, marks: Marks) -> Tensor:
        """See `Column.gates_of`; in full precision under autocast, as a site computes them."""
        parameters = column.parameters()
        kind = parameters[0][0].device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return column.gates_of(parameters, marks)
        return column.gates_of(parameters, marks)

    def take_references(self, fresh: set[ConstantGate]) -> None:
        """Take the references of ``fresh`` gates again: 1 is what they are in the arithmetic of the group."""
        if not self.able:
            return
        for column in self.columns:
            if column.references:
                for gate, row in zip(column.gates, self.column_gates(column, Marks()), strict=True):
                    if gate in fresh:
                        gate.reference = row[None].clone()


def groups_of(sites: dict[str, Any], forms: Forms) -> list[Group]:
    """Plan the groups of ``sites`` (path -> plugged layer); those that cannot be computed together are in none.

    Args:
        sites: in the order of the model.
        forms: of the attentions that were met before; new ones are added.
    """
    met: dict[Hashable, Any] = {}
    alike: defaultdict[tuple[str, tuple[Hashable, ...]], list[Any]] = defaultdict(list)
    for path, layer in sites.items():
        keys = [key(gate) for gate in layer.gate]
        for gate, found in zip(layer.gate, keys, strict=True):
            if found in met:
                continue
            if isinstance(gate.site_attention, Member):
                met[found] = shared_form(gate)
            else:
                if found not in forms:
                    forms[found] = batched_form(gate)
                met[found] = forms[found]
        if all(met[found] is not None for found in keys):
            alike[stage(path), tuple(keys)].append(layer)
    return [
        Group(part, [Column([layer.gate[i] for layer in part], met[k]) for i, k in enumerate(kinds)])
        for (_, kinds), layers in alike.items()
        for part in parts(layers, whole=any(met[k].chained for k in kinds))
    ]


def key(gate: ConstantGate) -> Hashable:
    """What gates of a column have in common."""
    attention = gate.site_attention
    if isinstance(attention, Member):
        return id(attention.unit), id(attention.run), gate.reference is None
    return signature(gate)


def parts(layers: list[Any], whole: bool) -> Iterable[list[Any]]:
    """Cut a list into parts of equal length, at most `LONGEST`, unless it is to stay ``whole``."""
    number = 1 if whole else -(-len(layers) // LONGEST)
    for i in range(number):
        yield layers[i * len(layers) // number : (i + 1) * len(layers) // number]


def stage(path: str) -> str:
    """What a site's path has before its first number: ``backbone.layer1.0.bn2`` is in ``backbone.layer1``."""
    return re.split(r'\.\d+\.', path, maxsplit=1)[0]


def able(state: list[Any]) -> bool:
    """Whether parameters may be stacked: plain ones (not sharded), of one precision, in one place (not offloaded)."""
    if not state or None in state:
        return False
    plain, dtypes, devices, _ = zip(*state, strict=True)
    return all(plain) and len({*dtypes}) == len({*devices}) == 1 and devices[0].type != 'meta'


def scalable(layer: Any, name: str, v: Tensor) -> Tensor | None:
    """Weight or bias of a layer, if it is one number a channel that can be scaled together with others."""
    held = layer._parameters.get(name)
    if held is None or type(held) not in PLAIN or held.dim() != 1 or held.dtype != v.dtype or held.device != v.device:
        return None
    return held if held.numel() == v.shape[1] else None
