"""Text for messages, logs, files and notebooks: short lists of names, and tables."""

from __future__ import annotations

from html import escape
from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ['Printed', 'html', 'render', 'some']


class Printed:
    """Base of results: ``str`` and ``repr`` are their tables and lines, and a notebook shows them as HTML.

    A dataclass among them takes ``repr=False``.
    """

    def parts(self) -> list[Table | str]:
        """Return the tables and lines, from the top."""
        raise NotImplementedError

    def __str__(self) -> str:
        return '\n'.join(part if isinstance(part, str) else render(part) for part in self.parts())

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return '\n'.join(
            f'<p style="white-space: pre-wrap">{escape(part)}</p>' if isinstance(part, str) else html(part)
            for part in self.parts()
        )


def some(names: list[str], most: int = 6) -> str:
    """Return the first names and a count of the rest."""
    if not names:
        return 'none'
    rest = f', ... ({len(names)} in all)' if len(names) > most else ''
    return ', '.join(names[:most]) + rest


def render(table: Table, width: int = 140) -> str:
    """Render a rich table as plain text, for logs and files; what is in its cells is text and no markup."""
    from rich.console import Console  # names in messages need no rich

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


def html(table: Table) -> str:
    """Render a rich table, whose cells are text, as a table of HTML."""
    align = [
        f' style="text-align: {column.justify if column.justify != "default" else "left"}"' for column in table.columns
    ]
    title = f'<caption>{escape(str(table.title))}</caption>' if table.title else ''
    head = ''.join(f'<th{a}>{escape(str(c.header))}</th>' for a, c in zip(align, table.columns, strict=True))
    rows = [
        ''.join(f'<td{a}>{escape(str(cell))}</td>' for a, cell in zip(align, row, strict=True))
        for row in zip(*(column.cells for column in table.columns), strict=True)
    ]
    body = ''.join(f'<tr>{row}</tr>' for row in rows)
    return f'<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
