"""What stands in for queries, keys, values and their product: the base class, and what follows it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from asr_downstream.errors import PlugError, did_you_mean
from asr_downstream.registry import Registry

__all__ = ['MIXERS', 'VARIANTS', 'Mixer', 'Variant', 'uncast']

MIXERS = Registry('mixer')


@dataclass(frozen=True)
class Variant:
    """A form of the replacement.

    Attributes:
        head_proj: whether each head has a projection back to its width, so that its outputs are comparable with the
            attention's heads.
        projection: what follows: ``'kept'`` (the teacher's output projection), ``'fresh'`` (a new one in its place), or
            ``'own'`` (one of the module, from the states of all heads).
        note: for the documentation.
    """

    head_proj: bool
    projection: str
    note: str


# Of the repository's history: M1 is its form of June 2025, M2 of 18 June, M3 from 26 June 2025 on.
VARIANTS = {
    'M1': Variant(False, 'own', 'pre-projection, heads, one projection of all states'),
    'M2': Variant(True, 'fresh', 'pre-projection, heads, a projection a head, a fresh output projection'),
    'M3': Variant(True, 'kept', "pre-projection, heads, a projection a head, the teacher's output projection"),
}


class Mixer(nn.Module):
    """Mixes tokens: ``(B, N, channels) -> (B, N, out_channels)``.

    A subclass sets ``pre_proj``, what comes before the heads, and has ``outputs``.

    Args:
        channels: of a token.
        heads: number of heads.
        variant: a key of `VARIANTS`.

    Attributes:
        name: in a spec, ``mixer='lstm'``.
        note: for model cards.
        takes: keys of a spec that are its own.
        widths: hidden units of each head, ``(ahead, back)``, if it has some.
        full: number of hidden units before pruning.
        reads: in which order the tokens are read, if in one.
        execution: how the heads run, if there are several ways.
        apart: whether each head reads channels of its own.

    Raises:
        PlugError: sizes do not fit, or a name is not known.
    """

    name: ClassVar[str]
    note: ClassVar[str]
    takes: ClassVar[tuple[str, ...]] = ()
    pre_proj: nn.Module
    execution = ''
    reads = ''
    full = 0
    apart = False

    def __init__(self, channels: int, heads: int, variant: str) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise PlugError(f'FAR: variant={variant!r} is not known; {did_you_mean(str(variant), VARIANTS)}')
        if heads < 1 or channels % heads:
            raise PlugError(f'FAR: {channels} channels cannot be split into {heads} heads; give a divisor with heads=')
        self.channels, self.count, self.variant = channels, heads, variant

    @property
    def widths(self) -> list[tuple[int, int]]:
        """Hidden units of each head."""
        return []

    def fit(self, tokens: int) -> None:
        """Be ready for this many tokens, whatever they are, for timing."""

    def outputs(self, tokens: Tensor, size: Sequence[int] | None = None) -> list[Tensor]:
        """Output of each head ``(B, N, *)``, for what ``pre_proj`` made of the tokens; see `forward`."""
        raise NotImplementedError

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Mix tokens ``(B, N, channels)``, of images of ``size``, rows and columns, where that is known."""
        return torch.cat(self.outputs(self.pre_proj(x), size), -1)


def uncast(device: str) -> AbstractContextManager[Any]:
    """Suspend autocast, where it is on: the context is slow to enter."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
