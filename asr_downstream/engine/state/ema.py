"""Exponential moving average of a model, by name.

diffusers' EMAModel pairs parameters by position, leaves buffers out and cannot save a plugged model; this one keeps the
whole state dict. The decay grows with the steps as there: at step 1, 2, ... it is
``min(max_decay, 1 - (1 + (step - 1) / inv_gamma) ** -power)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from asr_downstream.console.text import some
from asr_downstream.errors import CheckpointError
from asr_downstream.files.weights import is_finite

__all__ = ['EMA']


class EMA:
    """Average of the parameters and floating-point buffers of a model; other buffers, and infinite ones, are copied.

    Frozen parameters are those of the model itself, and take no memory.

    Args:
        model: the model, unwrapped.
        max_decay: upper bound of the decay.
        inv_gamma: see above.
        power: see above.
    """

    def __init__(
        self, model: nn.Module, max_decay: float = 0.9999, inv_gamma: float = 1.0, power: float = 0.75
    ) -> None:
        self.max_decay = max_decay
        self.inv_gamma = inv_gamma
        self.power = power
        self.frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        found = {name: value.detach() for name, value in model.state_dict().items()}
        self.state = {name: value if name in self.frozen else value.clone() for name, value in found.items()}
        moving = [name for name in self.state if name not in self.frozen]
        self.averaged = [name for name in moving if self.state[name].is_floating_point() and is_finite(found[name])]
        self.copied = [name for name in moving if name not in set(self.averaged)]

    def decay_at(self, step: int) -> float:
        """Decay after ``step`` optimiser steps, counted from 1."""
        return min(self.max_decay, 1 - (1 + (step - 1) / self.inv_gamma) ** -self.power)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards ``model`` after optimiser step ``step``, counted from 1."""
        current = self.matching(model.state_dict())
        mean = self.averaged
        decay = self.decay_at(step)
        torch._foreach_lerp_([self.state[n] for n in mean], [current[n].detach() for n in mean], 1 - decay)
        for name in self.copied:
            self.state[name].copy_(current[name])

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[nn.Module]:
        """Put the average into ``model`` inside the block, and its own values back after it, also after an error."""
        own = {
            name: value.detach() if name in self.frozen else value.detach().clone()
            for name, value in self.matching(model.state_dict()).items()
        }
        try:
            model.load_state_dict(self.state)
            yield model
        finally:
            model.load_state_dict(own)

    def load(self, state: Mapping[str, Tensor], path: Path | str = 'EMA') -> None:
        """Continue from a saved average.

        Args:
            state: the average.
            path: where it is from, for messages.

        Raises:
            CheckpointError: it has other names or shapes.
        """
        for name, value in self.matching(state).items():
            if value.shape != self.state[name].shape:
                raise CheckpointError(
                    f'{path}: {name} is of another shape, {tuple(value.shape)} instead of '
                    f'{tuple(self.state[name].shape)}; resume from an earlier checkpoint'
                )
        for name in (*self.averaged, *self.copied):
            self.state[name].copy_(state[name])

    def matching(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return ``state`` if it has exactly the names of the average."""
        if apart := sorted(self.state.keys() ^ state.keys()):
            raise CheckpointError(f'EMA: the names of the weights differ: {some(apart)}; was the model changed since?')
        return state
