"""Attentions whose gates are known, and models with them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from asr_downstream import ChannelAttention, plug
from asr_downstream.registry import ATTENTIONS

C = 8


class Known(ChannelAttention):
    """Gates are ``gates(number)`` of each image, and an image carries its number as the value of all its pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.scale = nn.Parameter(torch.ones(()))
        self.gates: Callable[[Tensor], Tensor] = lambda numbers: torch.ones(len(numbers), channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.gates(x.flatten(1).mean(1)).to(x)


class Numbered(nn.Module):
    """Residual blocks that hand the first image on to every site, so that each sees the numbers."""

    def __init__(self, sites: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Pass() for _ in range(sites)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([block.conv(x) for block in self.blocks]).sum(0)


class Pass(nn.Module):
    """A block whose layer returns its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 1, groups=C)
        with torch.no_grad():
            self.conv.weight.fill_(1)
            self.conv.bias.zero_()


@contextmanager
def registered() -> Any:
    """Register `Known` inside the block."""
    ATTENTIONS.register_module(name='Known', module=Known, force=True)
    try:
        yield
    finally:
        del ATTENTIONS._module_dict['Known']


def numbered(*gates: Callable[[Tensor], Tensor]) -> Any:
    """Model of one stage with a site for each function of the numbers of images ``(B,)`` to gates ``(B, C)``."""
    model = Numbered(len(gates)).double().eval()
    with registered():
        plug(model, dict(type='Attention', attention=dict(type='Known'), sites=['blocks.*.conv']))
    for block, function in zip(model.blocks, gates, strict=True):
        block.conv.dynamic[0].attention.gates = function
    return model


def images(numbers: Tensor) -> Tensor:
    """Images of these numbers."""
    return numbers.double()[:, None, None, None].expand(-1, C, 2, 2).clone()
