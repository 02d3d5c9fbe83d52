"""Plugs: how an attention meets its sites. A plug builds the gates of a site; `plugging` attaches them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from asr_downstream.errors import PlugError
from asr_downstream.gates import ConstantGate, DynamicGate, Gate
from asr_downstream.layers import LAYERS
from asr_downstream.registry import ATTENTIONS, PLUGS, build, find
from asr_downstream.sites import Site

__all__ = ['ASR', 'Attention', 'Plug']


class Plug:
    """Base class: an attention spec, the sites it goes to, and whether the model keeps its outputs at the start.

    Args:
        attention: spec of the attention, ``dict(type='SE', reduction=16)``.
        sites: see `asr_downstream.sites.find_sites`.
        preserve: divide the gates by what they were at the start, so that a plugged model computes what the model
            computed before.
    """

    def __init__(self, attention: dict[str, Any], sites: str | Sequence[str] = 'residual', preserve: bool = False):
        if not isinstance(attention, dict) or 'type' not in attention:
            raise PlugError(
                f"{type(self).__name__}: attention={attention!r} should be a dict, as in attention=dict(type='SE')"
            )
        find(ATTENTIONS, attention['type'])
        self.attention = attention
        self.sites = sites
        self.preserve = preserve

    def build(self, site: Site) -> list[Gate]:
        """Build the gates of ``site``, with dtype and device of its layer; the model is not touched."""
        path, channels, like = site.path, site.channels, next(site.layer.parameters())
        gates = self.gates(site)
        for gate in gates:
            gate.to(device=like.device, dtype=like.dtype)
            self.check(gate, path, channels)
            if self.preserve:
                if isinstance(gate, DynamicGate):
                    start = getattr(gate.attention, 'start_constant', None)
                    if start is None:
                        raise PlugError(
                            f'{path}: preserve=True needs {self.attention["type"]}.start_constant(), which makes the '
                            f'first gates the same for every input'
                        )
                    start()
                gate.take_reference(path)
        return gates

    def gates(self, site: Site) -> list[Gate]:
        """Build the gates of one site."""
        raise PlugError(f'{type(self).__name__} builds no gates')

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


@PLUGS.register_module()
class ASR(Plug):
    """Attention on a learned input (ASR, ECCV 2024): constant gates, which fold into the site's layer.

    Args:
        attention: spec of the attention.
        repeat: number of such gates at each site, multiplied (the paper's delta; the official code has 1).
        init: start of psi.
        sites: see `Plug`.
        preserve: see `Plug`.
    """

    def __init__(
        self,
        attention: dict[str, Any],
        repeat: int = 1,
        init: float = 0.1,
        sites: str | Sequence[str] = 'residual',
        preserve: bool = False,
    ) -> None:
        super().__init__(attention, sites, preserve)
        if not isinstance(repeat, int) or repeat < 1:
            raise PlugError(f'ASR: repeat={repeat!r} must be a whole number of at least 1')
        self.repeat = repeat
        self.init = init

    def gates(self, site: Site) -> list[Gate]:
        preset = getattr(find(ATTENTIONS, self.attention['type']), 'on_learned_input', {})
        return [
            ConstantGate(build(ATTENTIONS, self.attention, channels=site.channels, **preset), site.channels, self.init)
            for _ in range(self.repeat)
        ]


@PLUGS.register_module()
class Attention(Plug):
    """An attention of its own at every site, on the feature map: the classic SE-ResNet form.

    Its gates depend on the input and do not fold, unless the attention has no input (LayerScale).
    """

    def gates(self, site: Site) -> list[Gate]:
        attention: nn.Module = build(ATTENTIONS, self.attention, channels=site.channels)
        if getattr(attention, 'uses_input', True):
            return [DynamicGate(attention, site.channels, LAYERS[site.stock].positions)]
        return [ConstantGate(attention, site.channels)]
