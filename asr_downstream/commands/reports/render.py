"""A page as one HTML file: styles and pictures inside, no script, no address of anything outside."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import asr_downstream
from asr_downstream.commands.reports.charts import drawn, drawn_arms
from asr_downstream.commands.reports.page import Picture, Section, Table
from asr_downstream.commands.reports.pictures import embed
from asr_downstream.errors import AsrError
from asr_downstream.files.atomic import size, write_atomically

__all__ = ['MOST_BYTES', 'html_of', 'write']

TEMPLATES = Path(__file__).parent / 'templates'
MOST_BYTES = 5_000_000
TEXT_BYTES = 600_000  # of a page without its pictures, about
LARGEST_PICTURE = 900_000


def write(out: Path, sections: Sequence[Section], title: str, about: str, most: int = MOST_BYTES) -> int:
    """Write a page.

    Args:
        out: the file.
        sections: what it says.
        title: of the page.
        about: line below the title.
        most: bytes that it may have; pictures are made smaller until it does.

    Returns:
        Its size in bytes.

    Raises:
        AsrError: it cannot be written, or is larger even without its pictures.
    """
    content = html_of(sections, title, about, most).encode('utf-8', 'replace')  # names may be half of a character
    if len(content) > most:
        raise AsrError(f'{out}: would have {size(len(content))}, more than {size(most)}; give fewer runs')
    write_atomically(out, lambda p: p.write_bytes(content))
    return len(content)


def html_of(sections: Sequence[Section], title: str, about: str, most: int = MOST_BYTES) -> str:
    """Text of a page; see `write`."""
    parts: Any = templates().get_template('parts.j2').module
    style = (TEMPLATES / 'page.css').read_text(encoding='utf-8')
    count = sum(len(section.pictures) for section in sections)
    share = min(LARGEST_PICTURE, max(0, most - TEXT_BYTES) // max(1, count))
    page = templates().get_template('page.html.j2')
    return page.render(
        title=title,
        about=about,
        sections=[shown(section, share) for section in sections],
        style=Markup(style),
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        badge=parts.badge,
        grid=parts.grid,
        made_by=f'Made by asr-downstream {asr_downstream.__version__}. One file; it loads nothing and runs nothing.',
    )


@cache
def templates() -> jinja2.Environment:
    """The templates; whatever is put into them is escaped."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def shown(section: Section, share: int) -> dict[str, Any]:
    """A section with its charts drawn and its pictures encoded."""
    return {
        'title': section.title,
        'verdicts': section.verdicts,
        'tables': [without_empty(table) for table in section.tables],
        'arms': [(arms, drawing) for arms in section.arms if (drawing := drawn_arms(arms))],
        'charts': [(chart, drawing) for chart in section.charts if (drawing := drawn(chart))],
        'pictures': [picture_of(picture, share) for picture in section.pictures],
        'facts': section.facts,
    }


def without_empty(table: Table) -> Table:
    """A table without the columns that no row has."""
    kept = [place for place in range(len(table.heads)) if not place or any(row[place] for row in table.rows)]
    rows = [[row[place] for place in kept] for row in table.rows]
    return replace(table, heads=[table.heads[place] for place in kept], rows=rows)


def picture_of(picture: Picture, share: int) -> dict[str, Any]:
    """A picture that the template shows."""
    found = embed(picture.path, share)
    uri, pixels = found if found is not None else (None, (0, 0))
    return {'uri': uri, 'size': pixels, 'caption': picture.caption, 'wide': picture.wide}
