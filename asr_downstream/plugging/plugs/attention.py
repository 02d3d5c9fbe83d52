"""`Attention` and `DIA`: gates of an attention on the feature map, its own at every site or shared along a stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from asr_downstream.console.text import some
from asr_downstream.errors import PlugError
from asr_downstream.plugging.gating.gates import ConstantGate, DynamicGate, Gate
from asr_downstream.plugging.gating.sides import OUTPUT
from asr_downstream.plugging.kernels.memory import check_memory
from asr_downstream.plugging.layers import plugged_class
from asr_downstream.plugging.plugs.base import Plug
from asr_downstream.plugging.sites import Site
from asr_downstream.plugging.stages import Share
from asr_downstream.registry import PLUGS

__all__ = ['DIA', 'Attention']


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
