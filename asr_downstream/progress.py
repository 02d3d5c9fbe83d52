"""A progress bar on a terminal, and one line in a log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

__all__ = ['bar']

T = TypeVar('T')


def bar(items: Iterable[T], text: str) -> Iterator[T]:
    """Iterate with a bar that goes away when done; where there is no terminal, only say what is done."""
    console = Console()
    if console.is_terminal:
        yield from track(items, description=text, transient=True, console=console)
    else:
        print(f'{text} ...', flush=True)
        yield from items
