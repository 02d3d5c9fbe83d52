"""Means and speed between two lines of the log."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from mmengine.config import Config
from torch import Tensor

__all__ = ['Window']


class Window:
    """Mean loss and speed since the last line of the log; time for checkpoints and validation does not count.

    A training that stops between two lines shows what there is, and goes on with it: see `state`.

    Args:
        accelerator: of the processes.
        config: of the training.
    """

    def __init__(self, accelerator: Accelerator, config: Config) -> None:
        self.accelerator = accelerator
        self.images_a_forward = config.train_batch_size * accelerator.num_processes
        self.accumulation = config.gradient_accumulation_steps
        self.start(0)

    def start(self, since: int) -> None:
        """Begin anew, after step ``since``."""
        self.since = since
        self.losses: list[Tensor] = []
        self.others: dict[str, list[Tensor]] = {}
        self.clock = time.perf_counter()

    def add(self, loss: Tensor, others: Mapping[str, Tensor]) -> None:
        """Note the loss of a forward and its other scalars, without waiting for them."""
        self.losses.append(loss.detach())
        for name, value in others.items():
            self.others.setdefault(name, []).append(value.detach())

    def row(self, step: int, lr: Any, norm: Any, images: int) -> dict[str, Any]:
        """Line of the log."""
        means = [torch.stack(values).float().mean() for values in (self.losses, *self.others.values())]
        loss, *others = self.accelerator.reduce(torch.stack(means), 'mean').tolist()
        seconds = time.perf_counter() - self.clock
        seen = len(self.losses) * self.images_a_forward
        return {
            'step': step,
            'epoch': round(step * self.accumulation * self.images_a_forward / images, 4),
            'loss': loss,
            **dict(zip(self.others, others, strict=True)),
            'lr': float(lr),
            'grad_norm': math.nan if norm is None else float(norm),  # DeepSpeed keeps it to itself
            'images_per_second': round(seen / seconds, 2),
        }

    def state(self) -> dict[str, Any]:
        """State of the window of this process, for a checkpoint."""
        return {
            'losses': numbers(self.losses),
            'others': {name: numbers(values) for name, values in self.others.items()},
            'seconds': time.perf_counter() - self.clock,
        }

    def take_up(self, state: Mapping[str, Any], since: int) -> None:
        """Continue from the `state` in a checkpoint."""
        device = self.accelerator.device
        self.since = since
        self.losses = list(torch.tensor(state['losses'], device=device).float())
        self.others = {k: list(torch.tensor(v, device=device).float()) for k, v in state['others'].items()}
        self.clock = time.perf_counter() - state['seconds']

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside the block out."""
        begin = time.perf_counter()
        yield
        self.clock += time.perf_counter() - begin


def numbers(values: list[Tensor]) -> list[float]:
    """Numbers of scalars, all at once."""
    return torch.stack(values).float().tolist() if values else []
