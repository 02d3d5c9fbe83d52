"""What a line of the log sums up: means and speed since the line before."""

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
    """Mean loss and speed since the last line of the log; time for checkpoints and validation does not count."""

    def __init__(self, accelerator: Accelerator, config: Config) -> None:
        self.accelerator = accelerator
        self.images_a_forward = config.train_batch_size * accelerator.num_processes
        self.accumulation = config.gradient_accumulation_steps
        self.losses: list[Tensor] = []
        self.others: dict[str, list[Tensor]] = {}
        self.clock = time.perf_counter()

    def add(self, loss: Tensor, others: Mapping[str, Tensor]) -> None:
        """Note the loss of a forward and its other scalars, without waiting for them."""
        self.losses.append(loss.detach())
        for name, value in others.items():
            self.others.setdefault(name, []).append(value.detach())

    def row(self, step: int, lr: Any, norm: Any, images: int) -> dict[str, Any]:
        """Line of the log; starts the next window."""
        means = [torch.stack(values).float().mean() for values in (self.losses, *self.others.values())]
        loss, *others = self.accelerator.reduce(torch.stack(means), 'mean').tolist()
        seconds = time.perf_counter() - self.clock
        seen = len(self.losses) * self.images_a_forward
        row = {
            'step': step,
            'epoch': round(step * self.accumulation * self.images_a_forward / images, 4),
            'loss': loss,
            **dict(zip(self.others, others, strict=True)),
            'lr': float(lr),
            'grad_norm': math.nan if norm is None else float(norm),  # DeepSpeed keeps it to itself
            'images_per_second': round(seen / seconds, 2),
        }
        self.losses, self.others, self.clock = [], {}, time.perf_counter()
        return row

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside the block out."""
        begin = time.perf_counter()
        yield
        self.clock += time.perf_counter() - begin
