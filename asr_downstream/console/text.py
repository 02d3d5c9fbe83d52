"""Text for messages, logs and files: short lists of names, and tables."""

from __future__ import annotations

from io import StringIO

from rich.console import Console
from rich.table import Table

__all__ = ['render', 'some']


def some(names: list[str], most: int = 6) -> str:
    """Return the first names and a count of the rest."""
    if not names:
        return 'none'
    rest = f', ... ({len(names)} in all)' if len(names) > most else ''
    return ', '.join(names[:most]) + rest


def render(table: Table, width: int = 140) -> str:
    """Render a rich table as plain text, for logs and files; what is in its cells is text and no markup."""
    console = Console(
        file=StringIO(),
        width=width,
        color_system=None,
        force_terminal=False,
        markup=False,
        emoji=False,
        highlight=False,
    )
    console.print(table)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]
