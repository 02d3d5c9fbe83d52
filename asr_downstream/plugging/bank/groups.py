"""Groups of sites whose constant gates are computed together, see `asr_downstream.plugging.bank.hooks`.

A group is a plan: the sites, and where their parameters lie. It reads the parameters anew in every forward (training,
``functional_call`` and swapped weights change them), and says by itself when the plan is out of date.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from asr_downstream.modules.affine import Constants
from asr_downstream.modules.check import FLATTENED
from asr_downstream.plugging.bank.alike import Form, Forms, batched_form, hooked, links, signature
from asr_downstream.plugging.bank.batched_gates import Marks, gather, scaled, with_inputs
from asr_downstream.plugging.bank.regained import regained
from asr_downstream.plugging.bank.shared_form import shared_form
from asr_downstream.plugging.gating.gates import ConstantGate
from asr_downstream.plugging.gating.shelf import Ready
from asr_downstream.plugging.gating.sides import INPUT
from asr_downstream.plugging.gating.site_attention import Member

__all__ = ['Group', 'groups_of']

LONGEST = 12  # sites of a group
PLAIN = (nn.Parameter, Tensor)


def is_plain(p: Tensor) -> bool:
    """Whether a parameter is whole and no other kind of tensor: a view into a flat one of FSDP1 is of one process."""
    return type(p) in PLAIN and not getattr(p, FLATTENED, False)


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
        self.shifted = gates[0].bias is not None

    def parameters(self) -> list[list[Any]]:
        """Those of each site, psi first if there is one; None where a name is gone."""
        return [[held.get(name) for held, name in of_site] for of_site in self.places]

    def shifts(self) -> list[Any]:
        """Those of the sites; None where there is none."""
        return [gate._parameters.get('bias') for gate in self.gates]

    def state(self) -> list[Any]:
        """What the plan depends on in parameters: kind, precision, place and shape."""
        return [
            None if p is None else (is_plain(p), p.dtype, p.device, p.shape)
            for of_site in (*self.parameters(), self.form.shared(), self.shifts() if self.shifted else ())
            for p in of_site
        ]

    def stands(self) -> bool:
        """Whether the modules are those that the plan was made for."""
        return all(held.get(key) is value for held, key, value in self.links) and all(
            (gate._buffers['reference'] is not None) is self.references
            and (gate._parameters.get('bias') is not None) is self.shifted
            for gate in self.gates
        )

    def gates_of(self, parameters: list[list[Tensor]], marks: Marks) -> Tensor:
        """The gates ``(sites, C)``, before they are divided by the references."""
        stacks = gather(parameters, marks, self.form.chained)
        psi, own = (stacks[0], stacks[1:]) if self.gates[0].psi is not None else (None, stacks)
        with regained(parameters, stacks):
            return self.form(self.gates, dict(zip(self.names, own, strict=True)), psi)


class Group:
    """Sites that are alike.

    Args:
        layers: plugged, in the order of the model.
        columns: of their gates; those of a shift come last of their side.
    """

    def __init__(self, layers: list[Any], columns: list[Column]) -> None:
        self.layers = layers
        self.columns = columns
        self.inputs = [column for column in columns if column.gates[0].side == INPUT]
        self.outputs = [column for column in columns if column.gates[0].side != INPUT]
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
        found = [Ready(Constants()) for _ in self.layers]
        if (v := self.product(self.outputs, marks)) is not None:
            weights = [scalable(layer, 'weight', v) for layer in self.layers]
            biases = [scalable(layer, 'bias', v) for layer in self.layers]
            found = scaled(v, weights, biases, self.outputs[-1].shifts(), marks)
        if (u := self.product(self.inputs, marks)) is not None:
            found = with_inputs(found, u, marks)
        return dict(zip(self.layers, found, strict=True))

    def product(self, columns: list[Column], marks: Marks) -> Tensor | None:
        """The product of columns of one side, ``(sites, C)``; None without any."""
        v: Tensor | None = None
        for column in columns:
            gates = self.column_gates(column, marks)
            if column.references:
                gates = gates / torch.cat([gate.reference for gate in column.gates])  # type: ignore[misc]
            v = gates if v is None else v * gates
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
    kinds: dict[str, tuple[Hashable, ...]] = {}
    for path, layer in sites.items():
        kinds[path] = tuple(map(kind, layer.gate))
        for gate, found in zip(layer.gate, kinds[path], strict=True):
            if found not in met:
                met[found] = form_of(gate, found, forms)
    able = {
        path: kinds[path]
        for path in in_order(sites)
        if all(met[found] is not None for found in kinds[path]) and shifted_last(list(sites[path].gate))
    }
    groups = []
    for paths in stages(able):
        columns = [met[found] for found in able[paths[0]]]
        for part in parts([sites[path] for path in paths], whole=any(form.chained for form in columns)):
            groups.append(
                Group(part, [Column([layer.gate[i] for layer in part], form) for i, form in enumerate(columns)])
            )
    return groups


def kind(gate: ConstantGate) -> Hashable:
    """What gates of a column have in common."""
    attention = gate.site_attention
    like = next(gate.parameters(), None)
    place = None if like is None else (like.dtype, like.device)
    beside = place, gate.side, gate.bias is None
    if isinstance(attention, Member):
        return id(attention.unit), id(attention.run), gate.reference is None, beside
    found = signature(gate)
    return None if found is None else (found, beside)


def shifted_last(gates: list[ConstantGate]) -> bool:
    """Whether no gates scale a shift of gates before them, as those of a plug after one with ``shift=True`` do."""
    return all(gate.bias is None for gate in [gate for gate in gates if gate.side != INPUT][:-1])


def form_of(gate: ConstantGate, found: Hashable, forms: Forms) -> Form | None:
    """The form of gates of a kind, from ``forms`` if it was met before."""
    if isinstance(gate.site_attention, Member):
        return shared_form(gate)
    if found not in forms:
        forms[found] = None if found is None else batched_form(gate)
    return forms[found]


def in_order(paths: Iterable[str]) -> list[str]:
    """Paths in the order in which their layers run, as far as names tell: diffusers registers the middle last."""
    return sorted(paths, key=lambda path: 'up_blocks' in path.split('.'))


def stages(kinds: Mapping[str, Hashable]) -> Iterable[list[str]]:
    """Gather sites of one kind that run close to each other.

    A site continues the group of its kind if it is the next one, or if both are in one numbered sequence (``layer1`` of
    ``layer1.0.bn2``). So widths may alternate within a stage, and a width that comes again later is another group.

    Args:
        kinds: path -> kind, in the order in which the sites run.
    """
    last: dict[Hashable, list[str]] = {}
    before: list[str] = []
    for path, found in kinds.items():
        group = last.get(found)
        if group is None or (group is not before and sequence(group[-1]) != sequence(path)):
            if group is not None:
                yield group
            group = last[found] = []
        group.append(path)
        before = group
    yield from last.values()


def sequence(path: str) -> str:
    """What a path has before its first number: ``backbone.layer1`` of ``backbone.layer1.0.bn2``."""
    return re.split(r'\.\d+\.', path, maxsplit=1)[0]


def parts(layers: list[Any], whole: bool) -> Iterable[list[Any]]:
    """Cut a list into parts of equal length, at most `LONGEST`, unless it is to stay ``whole``."""
    number = 1 if whole else -(-len(layers) // LONGEST)
    for i in range(number):
        yield layers[i * len(layers) // number : (i + 1) * len(layers) // number]


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
