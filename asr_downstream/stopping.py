"""Ctrl-C and termination as a request to stop at the next good moment."""

from __future__ import annotations

import signal
from typing import Any

__all__ = ['StopSignal']


class StopSignal:
    """Inside the block, the first Ctrl-C or termination only sets ``is_set``; the second interrupts."""

    is_set = False

    def __enter__(self) -> StopSignal:
        self.before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.handle)
        return self

    def handle(self, number: int, frame: Any) -> None:
        """Note the first one."""
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True
        print('\nstopping, with a checkpoint; once more stops at once', flush=True)

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
