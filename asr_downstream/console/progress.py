"""A progress bar on a terminal, and one line in a log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

__all__ = ['bar']

T = TypeVar('T')


def bar(items: Iterable[T], text: str) -> Iterator[T]:
    """Iterate with a bar that goes away when done; where there is no terminal, only say what is done."""
    console = Console()
    if console.is_terminal:
        # a text such as '[bold]' is the name of a run, and no markup
        columns = (
            TextColumn('{task.description}', markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, transient=True, console=console) as progress:
            yield from progress.track(items, description=text)
    else:
        print(f'{text} ...', flush=True)
        yield from items
