"""What processes exchange after every step: whether losses and gradients are finite, and whether to stop.

On CUDA this waits for nothing: three numbers are reduced with the step's own kernels, copied aside, and read one step
later, when they are there. Before a checkpoint they are read at once, so that no checkpoint is of after a divergence.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from asr_downstream.errors import AsrError, OtherProcessError

__all__ = ['Watch', 'whole']

SKIPPED_AT_MOST = 50  # fp16 halves its scale at each skipped step: from 2**16 it is gone long before


class Watch:
    """Numbers of the steps, over all processes."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.sent: list[tuple[int, Tensor, Any]] = []  # step, the numbers, and the event after which they are there
        self.stop = False
        self.skipped = 0

    def tell(self, step: int, loss: Tensor, norm: Tensor | float | None, stop: bool) -> None:
        """Send the numbers of a step.

        Args:
            step: optimiser steps done.
            loss: sum of the losses of its forwards.
            norm: of the gradients; None where it is not known.
            stop: whether this process was told to stop.
        """
        if self.accelerator.scaler is not None:
            norm = None  # fp16 skips steps with infinite gradients
        device = loss.device
        size = torch.zeros((), device=device) if norm is None else torch.as_tensor(norm, device=device)
        told = torch.full((), float(stop), device=device)
        numbers = torch.stack([value.detach().float() for value in (loss, size, told)])
        if self.accelerator.num_processes > 1:
            numbers = self.accelerator.reduce(numbers, 'sum')
        event = None
        if numbers.is_cuda:
            aside = torch.empty_like(numbers, device='cpu', pin_memory=True)
            aside.copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            numbers = aside
        self.sent.append((step, numbers, event))

    def heard(self, at_once: bool = False) -> bool:
        """Whether one of the processes was told to stop; all of them find it at the same step.

        Args:
            at_once: do not leave the last step for later.

        Raises:
            AsrError: loss or gradients are not finite; on all processes.
        """
        while self.sent and (at_once or self.sent[0][2] is None or len(self.sent) > 1):
            step, numbers, event = self.sent.pop(0)
            if event is not None:
                event.synchronize()
            loss, norm, stop = numbers.tolist()
            for value, what in ((loss, 'the loss'), (norm, 'the norm of the gradients')):
                if not math.isfinite(value):
                    self.fail(f'step {step}: {what} is {value}')
            self.stop |= stop > 0
        return self.stop

    def count(self, was_skipped: bool) -> None:
        """Count the optimiser steps on end that fp16 skipped.

        Raises:
            AsrError: there are too many; on all processes.
        """
        self.skipped = self.skipped + 1 if was_skipped else 0
        if self.skipped > SKIPPED_AT_MOST:
            self.fail(f'the gradients of the last {self.skipped} steps were not finite in fp16')

    def fail(self, what: str) -> None:
        """End all processes; the main one says why."""
        raise (AsrError if self.accelerator.is_main_process else OtherProcessError)(what)


def whole(value: Any) -> Any:
    """A tensor whose parts are on the processes (a DTensor), put together; anything else as it is. All must ask."""
    return value.full_tensor() if hasattr(value, 'full_tensor') else value
