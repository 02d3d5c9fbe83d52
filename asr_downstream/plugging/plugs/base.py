"""`Plug`, the base class of the plugs that give sites gates of an attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from asr_downstream.errors import PlugError
from asr_downstream.plugging.gating.gates import ConstantGate, DynamicGate, Gate
from asr_downstream.plugging.gating.shared_unit import SharedUnit
from asr_downstream.plugging.gating.sides import OUTPUT, check_biases, check_sides, readers
from asr_downstream.plugging.gating.site_attention import LearnedInput, Member, Run
from asr_downstream.plugging.plugs.selection import Selection, Streams
from asr_downstream.plugging.sites import Site
from asr_downstream.plugging.stages import Share, group_sites
from asr_downstream.registry import ATTENTIONS, build, check_arguments, find

__all__ = ['Plug']


class Plug(Selection):
    """Base class: an attention spec, the sites it goes to, and how it goes there.

    Args:
        attention: spec of the attention, ``dict(type='SE', reduction=16)``.
        sites, skip: see `Selection`.
        preserve: divide the gates by what they were at the start, so that a plugged model computes what the model
            computed before.
        shift, side: see `asr_downstream.plugging.gating.sides`.

    Attributes:
        share: which sites share an attention, see `asr_downstream.plugging.stages.group_sites`; None: none do.
    """

    share: Share = None

    def __init__(
        self,
        attention: dict[str, Any],
        sites: str | Sequence[str] = 'residual',
        skip: Sequence[str] = (),
        preserve: bool = False,
        shift: bool = False,
        side: str = OUTPUT,
    ) -> None:
        if not isinstance(attention, dict) or not isinstance(attention.get('type'), str):
            raise PlugError(
                f"{type(self).__name__}: attention={attention!r} should be a dict, as in attention=dict(type='SE')"
            )
        self.factory = find(ATTENTIONS, attention['type'])
        check_arguments(
            f'attention {attention["type"]!r}',
            self.factory,
            {k: v for k, v in attention.items() if k != 'type'},
            given=('channels',),
        )
        if 'channels' in attention:
            raise PlugError(
                f'{type(self).__name__}: channels={attention["channels"]!r} is that of each layer; leave it out'
            )
        super().__init__(sites, skip)
        self.attention = attention
        self.preserve = preserve
        self.shift = shift
        self.side = side
        check_sides(type(self).__name__, shift, side, None if self.constant else attention['type'])

    @property
    def constant(self) -> bool:
        """Whether the gates are constant."""
        return not self.uses_input

    def select(self, sites: list[Site]) -> list[Site]:
        """Leave out the sites that ``skip`` names, and say which side of the others the gates scale.

        Raises:
            PlugError: see `Selection.select`, or some have not what ``shift`` or ``side`` need.
        """
        kept = super().select(sites)
        layers = {site.path: site.layer for site in kept}
        if self.shift:
            check_biases(layers)
        if self.side == OUTPUT:
            return kept
        paths = readers(layers, named=self.sites != 'all')
        return [replace(site, side=self.side) for site in kept if site.path in paths]

    @property
    def uses_input(self) -> bool:
        """Whether the attention looks at its input."""
        return getattr(self.factory, 'uses_input', True)

    def build(self, sites: list[Site], stream: Streams) -> tuple[dict[str, list[Gate]], list[SharedUnit]]:
        """Build the gates of all ``sites``, with dtype and device of their layers; the model is not touched.

        Returns:
            Path of the site -> its gates, and the units that they share.

        Raises:
            PlugError: the attention does not fit a site, or the sites cannot share it.
        """
        gates: dict[str, list[Gate]] = {}
        units: list[SharedUnit] = []
        if self.share is None:
            for site in sites:
                with stream(site.path):
                    gates[site.path] = [self.fit(site, self.own(site)) for _ in range(self.copies)]
        else:
            for number, group in enumerate(group_sites(sites, self.share)):
                with stream(f'{number}.{group.name}'):
                    for _ in range(self.copies):
                        units.append(self.shared(group.name, group.runs, gates))
        if self.preserve:
            self.start_from_one(gates)
        for site in sites:
            last = gates[site.path][-1]
            if self.shift and isinstance(last, ConstantGate):
                last.learn_shift(site.layer.bias)  # type: ignore[arg-type]
        return {site.path: gates[site.path] for site in sites}, units

    @property
    def copies(self) -> int:
        """Gates a site."""
        return 1

    def own(self, site: Site) -> Gate:
        """Build a gate with an attention of its own."""
        return self.gate(site, self.make(site.channels))

    def shared(self, name: str, runs: Sequence[Sequence[Site]], gates: dict[str, list[Gate]]) -> SharedUnit:
        """Build a unit, add a gate for each of its sites to ``gates``, and return the unit."""
        first = runs[0][0]
        like = next(first.layer.parameters())
        unit = SharedUnit(self.make(first.channels).to(device=like.device, dtype=like.dtype), name)
        for number, sites in enumerate(runs):
            run = Run(number)
            for site in sites:
                gate = self.gate(site, Member(unit, run))
                if isinstance(gate, LearnedInput):
                    run.inputs.append(gate)
                gates.setdefault(site.path, []).append(self.fit(site, gate))
        return unit

    def make(self, channels: int) -> nn.Module:
        """Build the attention."""
        return build(ATTENTIONS, self.attention, channels=channels)

    def gate(self, site: Site, attention: nn.Module) -> Gate:
        """Build the gate of one site around its attention."""
        raise PlugError(f'{type(self).__name__} builds no gates')

    def fit(self, site: Site, gate: Gate) -> Gate:
        """Give a gate the dtype and device of its layer, and check it."""
        like = next(site.layer.parameters())
        gate.to(device=like.device, dtype=like.dtype)
        self.check(gate, site.path, site.channels)
        return gate

    def start_from_one(self, gates: dict[str, list[Gate]]) -> None:
        """Make the gates of this moment the new 1; those that depend on the input are first made constant."""
        dynamic = (gate for of_site in gates.values() for gate in of_site if isinstance(gate, DynamicGate))
        for attention in dict.fromkeys(gate.site_attention.original for gate in dynamic):
            self.start_constant(attention)
        for path, of_site in gates.items():
            for each in of_site:
                each.take_reference(path)

    def start_constant(self, attention: nn.Module) -> None:
        """Make the first gates of an attention the same for every input."""
        start = getattr(attention, 'start_constant', None)
        if start is None:
            raise PlugError(
                f'preserve=True needs {self.attention["type"]}.start_constant(), which makes the first gates the same '
                f'for every input'
            )
        start()

    @torch.no_grad()
    def check(self, gate: Gate, path: str, channels: int) -> None:
        """Run a fresh gate once: it must give one finite number a channel."""
        try:
            v = gate.probe()
        except Exception as error:
            raise PlugError(
                f'{path}: attention {self.attention["type"]} fails on {channels} channels: {error}'
            ) from error
        if v.shape != (1, channels):
            raise PlugError(
                f'{path}: attention {self.attention["type"]} gives gates of shape {tuple(v.shape)}, '
                f'expected (1, {channels}) for this layer'
            )
        if not v.isfinite().all():
            raise PlugError(f'{path}: the first gates of {self.attention["type"]} are not finite')
