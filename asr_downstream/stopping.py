"""Ctrl-C and termination as a request to stop at the next good moment."""

from __future__ import annotations

import os
import signal
from typing import Any

__all__ = ['StopSignal']


class StopSignal:
    """Inside the block, the first Ctrl-C or termination only sets ``is_set``; the second interrupts."""

    is_set = False

    def __enter__(self) -> StopSignal:
        self.process = os.getpid()
        self.before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.handle)
        return self

    def handle(self, number: int, frame: Any) -> None:
        """Note the first one."""
        if os.getpid() != self.process:  # a worker of a data loader, which has this handler from its parent
            return
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True
        os.write(1, b'\nstopping, with a checkpoint; once more stops at once\n')  # print may be in use

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
