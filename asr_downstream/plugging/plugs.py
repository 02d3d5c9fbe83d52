"""Plugs: which gates an attention gives the sites of a model. A plug builds them; `plug` attaches them.

Attention    an attention of its own at every site, on the feature map
DIA          one attention for the sites of a stage, on the feature map; a recurrent one carries a state along them
ASR          on a learned input: constant gates. Own attentions, or shared ones like DIA's
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import nn

from asr_downstream.console.text import some
from asr_downstream.errors import PlugError
from asr_downstream.plugging.gating.gates import ConstantGate, DynamicGate, Gate
from asr_downstream.plugging.gating.shared_unit import SharedUnit
from asr_downstream.plugging.gating.sides import OUTPUT, check_biases, check_sides, readers
from asr_downstream.plugging.gating.site_attention import LearnedInput, Member, Run
from asr_downstream.plugging.kernels.memory import check_memory
from asr_downstream.plugging.layers import plugged_class
from asr_downstream.plugging.sites import Site
from asr_downstream.plugging.stages import Share, group_sites
from asr_downstream.registry import ATTENTIONS, PLUGS, build, check_arguments, find

__all__ = ['ASR', 'DIA', 'Attention', 'Plug']

# Name -> context in which random numbers come from a stream of that name.
Streams: TypeAlias = Callable[[str], AbstractContextManager[None]]


class Plug:
    """Base class: an attention spec, the sites it goes to, and how it goes there.

    Args:
        attention: spec of the attention, ``dict(type='SE', reduction=16)``.
        sites: see `asr_downstream.plugging.sites.find_sites`.
        skip: patterns of sites to leave out; a recurrent state goes from the site before to the one after.
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
        if not patterns(skip):
            one = f', [{skip!r}]' if isinstance(skip, str) else ''
            raise PlugError(f'skip={skip!r} should be a list of patterns{one}')
        if not isinstance(sites, str) and not patterns(sites):
            raise PlugError(f"sites={sites!r} should be 'residual', 'all' or a list of patterns")
        if not isinstance(sites, str) and not sites:
            raise PlugError("sites=[] is empty: use 'residual', 'all' or patterns of layers, ['layer1.*.bn2']")
        self.attention = attention
        self.sites = sites
        self.skip = list(skip)
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
            PlugError: a pattern matches nothing, all sites are left out, or some have not what ``shift`` or ``side``
                need.
        """
        for pattern in self.skip:
            if not any(fnmatchcase(site.path, pattern) for site in sites):
                raise PlugError(f'skip: {pattern!r} matches none of the {len(sites)} sites, such as {sites[0].path}')
        kept = [s for s in sites if not any(fnmatchcase(s.path, pattern) for pattern in self.skip)]
        if not kept:
            raise PlugError(f'skip={self.skip!r} leaves out all {len(sites)} sites')
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


def patterns(value: Any) -> bool:
    """Whether a value is a list of texts."""
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


@PLUGS.register_module()
class ASR(Plug):
    """Attention on a learned input (ASR, ECCV 2024): constant gates, which fold into the site's layer.

    With ``DIALSTM`` the learned inputs go through one recurrent unit a stage; the gates are constant all the same.

    Args:
        attention: spec of the attention.
        repeat: number of such gates at each site, multiplied (the paper's delta; the official code has 1).
        init: start of psi.
        sites, skip, preserve, shift, side: see `Plug`.
        share: see `Plug`; the default is ``'stage'`` for a recurrent attention and None for others.
    """

    def __init__(
        self,
        attention: dict[str, Any],
        repeat: int = 1,
        init: float = 0.1,
        sites: str | Sequence[str] = 'residual',
        skip: Sequence[str] = (),
        preserve: bool = False,
        share: Share = None,
        shift: bool = False,
        side: str = OUTPUT,
    ) -> None:
        super().__init__(attention, sites, skip, preserve, shift, side)
        if repeat < 1:
            raise PlugError(f'ASR: repeat={repeat!r} must be a whole number of at least 1')
        self.repeat = int(repeat)
        self.init = float(init)
        self.share = 'stage' if share is None and getattr(self.factory, 'recurrent', False) else share

    @property
    def constant(self) -> bool:
        return True

    @property
    def copies(self) -> int:
        return self.repeat

    def make(self, channels: int) -> nn.Module:
        preset = getattr(self.factory, 'on_learned_input', {})
        return build(ATTENTIONS, self.attention, channels=channels, **preset)

    def gate(self, site: Site, attention: nn.Module) -> Gate:
        return ConstantGate(attention, site.channels, self.init, site.side)


@PLUGS.register_module()
class Attention(Plug):
    """An attention of its own at every site, on the feature map: the classic SE-ResNet form.

    Its gates depend on the input and have no exact fold, unless the attention has no input (LayerScale).

    Args:
        attention: spec of the attention.
        sites, skip, preserve: see `Plug`; for an attention without an input also ``shift`` and ``side``.
        memory: ``'low'`` keeps no second feature map a site for the backward pass, where there is a way to; ``'plain'``
            keeps it; None is what measured faster, see `asr_downstream.plugging.kernels.memory`.
    """

    def __init__(
        self,
        attention: dict[str, Any],
        sites: str | Sequence[str] = 'residual',
        skip: Sequence[str] = (),
        preserve: bool = False,
        memory: str | None = None,
        shift: bool = False,
        side: str = OUTPUT,
    ) -> None:
        super().__init__(attention, sites, skip, preserve, shift, side)
        check_memory(type(self).__name__, memory)
        self.memory = memory

    def select(self, sites: list[Site]) -> list[Site]:
        """Leave out the sites that ``skip`` names, and those that see windows of an image as samples of their own.

        An attention without an input may have the latter: its gates are the same for every window.

        Raises:
            PlugError: ``sites`` names such a layer, or all sites are left out.
        """
        kept = super().select(sites)
        windows = [site.path for site in kept if site.windows] if self.uses_input else []
        if not windows:
            return kept
        whole = [site for site in kept if not site.windows]
        if not isinstance(self.sites, str) or not whole:
            raise PlugError(
                f'{some(windows, 3)}: sees windows of an image as samples of their own, so gates that depend on the '
                f"input would be those of a window; leave it out of sites=[...], or use dict(type='ASR', ...)"
            )
        return whole

    def gate(self, site: Site, attention: nn.Module) -> Gate:
        if getattr(attention, 'uses_input', True):
            kind: Any = plugged_class(site.stock)
            return DynamicGate(attention, site.channels, kind.positions, self.memory)
        return ConstantGate(attention, site.channels, side=site.side)


@PLUGS.register_module()
class DIA(Attention):
    """One attention shared along the sites of a stage (DIA, AAAI 2020; arXiv 2210.16101), on the feature map.

    ``DIALSTM`` is the papers' unit and carries a state from site to site; any other attention may be shared as well
    ("DIA-SE"). Normalisation inside an attention stays with its site.

    Args:
        attention: spec of the attention.
        sites, skip, preserve, shift, side: see `Attention`.
        memory: see `Attention`.
        share: ``'stage'``, ``'width'``, or lists of patterns; see `asr_downstream.plugging.stages.group_sites`.
    """

    def __init__(
        self,
        attention: dict[str, Any],
        sites: str | Sequence[str] = 'residual',
        skip: Sequence[str] = (),
        preserve: bool = False,
        share: Share = 'stage',
        memory: str | None = None,
        shift: bool = False,
        side: str = OUTPUT,
    ) -> None:
        super().__init__(attention, sites, skip, preserve, memory, shift, side)
        if share is None:
            raise PlugError(
                "DIA shares an attention: share='stage', 'width' or lists of patterns; without, use Attention"
            )
        self.share = share
