"""What is shown of things that go on at once: lines, and on a terminal, below them, one line of where they are."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from typing import TextIO

__all__ = ['Display', 'clock']


def clock(seconds: float) -> str:
    """Return a time as minutes and seconds."""
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


class Display:
    """Lines above, the states of what is running below; where there is no terminal a state is a line now and then.

    Args:
        out: where to print.
        every: seconds between two lines about the same thing, where there is no terminal.
    """

    def __init__(self, out: TextIO | None = None, every: float = 30) -> None:
        self.every = every
        self.out = out or sys.stdout
        self.terminal = self.out.isatty()
        self.states: dict[str, str] = {}
        self.said: dict[str, tuple[float, str]] = {}
        self.lock = threading.RLock()

    def line(self, text: str) -> None:
        """Print a line."""
        with self.lock:
            self.write(f'{text}\n')

    def state(self, name: str, text: str) -> None:
        """Say where ``name`` is; an empty text ends it."""
        with self.lock:
            if not text:
                self.states.pop(name, None)
            else:
                self.states[name] = text
            if self.terminal:
                self.write('')
                return
            when, before = self.said.setdefault(name, (time.monotonic(), ''))
            if text and text != before and time.monotonic() - when >= self.every:
                self.said[name] = time.monotonic(), text
                self.write(f'{text}\n')

    def write(self, text: str) -> None:
        """Print above the states."""
        if self.terminal:
            below = ' | '.join(self.states.values())[: shutil.get_terminal_size().columns - 1]
            text = f'\r\033[K{text}{below}'
        self.out.write(text)
        self.out.flush()
