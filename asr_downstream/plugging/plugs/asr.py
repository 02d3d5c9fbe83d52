"""`ASR`: constant gates of an attention on a learned input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from asr_downstream.errors import PlugError
from asr_downstream.plugging.gating.gates import ConstantGate, Gate
from asr_downstream.plugging.gating.sides import OUTPUT
from asr_downstream.plugging.plugs.base import Plug
from asr_downstream.plugging.sites import Site
from asr_downstream.plugging.stages import Share
from asr_downstream.registry import ATTENTIONS, PLUGS, build

__all__ = ['ASR']


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
