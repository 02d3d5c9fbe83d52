"""Draw the picture of the README: a detector and a UNet, stock, plugged and folded, side by side, with what they cost.

    python -m handbook.overview      # in tools/; writes docs/assets/overview*.svg and overview.json

The figures are counted by `handbook.figures`. There are two files: panels side by side, and one above the other for
narrow windows. The forms differ by their outlines (thin, dashed, thick) and not by colours alone; the ground is white,
so that the text is readable on dark pages too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).resolve().parents[2] / 'docs' / 'assets'
INK, GREY, BLUE, PALE = '#1f2328', '#57606a', '#0b4fa8', '#e7effb'
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', Arial, sans-serif"
WIDTH, COLUMN, LEFT, GAP = 640, 188, 20, 18  # a panel, a column, the first column, what is between columns
TOP, DIAGRAM, ROW = 94, 214, 55  # where the columns start, the height of their boxes, the height of a row
FORMS = {'stock': 'start from this', 'plugged': 'train this', 'folded': 'ship this'}
STROKES = {
    'stock': f'fill="none" stroke="{INK}" stroke-width="1.5"',
    'plugged': f'fill="{PALE}" stroke="{BLUE}" stroke-width="2.5" stroke-dasharray="9 5"',
    'folded': f'fill="none" stroke="{INK}" stroke-width="4"',
}


def text(x: float, y: float, words: str, size: int = 20, anchor: str = 'middle', **style: str) -> str:
    """A line of text."""
    attributes = ''.join(f' {key.replace("_", "-")}="{value}"' for key, value in {'fill': INK, **style}.items())
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{attributes}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, attributes: str) -> str:
    """A rounded box."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" {attributes}/>'


def line(*points: tuple[float, float], arrow: bool = False, colour: str = INK) -> str:
    """A path from point to point."""
    path = ' '.join(f'{x:g},{y:g}' for x, y in points)
    end = ' marker-end="url(#arrow)"' if arrow else ''
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{end}/>'


def diagram(form: str, site: Sequence[str], centre: float, top: float) -> list[str]:
    """The end of a residual branch: what comes before the site, the site, and for the plugged form the gate."""
    before, plain, with_gates = site
    thin = f'fill="#ffffff" stroke="{INK}" stroke-width="1.5"'
    thick = f'fill="#ffffff" stroke="{INK}" stroke-width="3.5"' if form == 'folded' else thin
    drawn = [
        box(centre - 66, top, 132, 30, thin),
        text(centre, top + 21, before, 17),
        line((centre, top + 30), (centre, top + 46), arrow=True),
        box(centre - 66, top + 47, 132, 30, thick),
        text(
            centre,
            top + 68,
            with_gates if form == 'folded' else plain,
            17,
            font_weight='700' if form == 'folded' else '400',
        ),
    ]
    if form != 'plugged':
        return [*drawn, line((centre, top + 77), (centre, top + 126), arrow=True)]
    gate = centre - 40
    return [
        *drawn,
        line((gate, top + 77), (gate, top + 91), arrow=True),
        f'<circle cx="{gate:g}" cy="{top + 103:g}" r="11" fill="#ffffff" stroke="{BLUE}" stroke-width="2.5"/>',
        text(gate, top + 109, '×', 19, fill=BLUE, font_weight='700'),
        line((gate, top + 114), (gate, top + 126), arrow=True),
        line((gate + 30, top + 103), (gate + 13, top + 103), colour=BLUE),
        text(gate + 36, top + 109, 'v = SE(ψ)', 17, 'start', fill=BLUE, font_weight='700'),
    ]


def number(value: float) -> str:
    """A difference: ``0``, ``0.34`` or ``1.3 × 10⁻⁶``."""
    if value == 0 or value >= 0.01:
        return f'{value:.2f}' if value else '0'
    digits, power = f'{value:.1e}'.split('e')
    return f'{digits} × 10' + str(int(power)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))


def rows(forms: dict[str, Any]) -> dict[str, list[str]]:
    """Names of the rows of figures, and a text for each form."""
    every = [forms[name] for name in FORMS]
    return {
        'parameters': [f'{form["parameters"]:,}' for form in every],
        'entries of the state dict': [f'{form["keys"]:,}' for form in every],
        'multiply-adds of a forward, millions': [f'{form["gmacs"] * 1e3:,.2f}' for form in every],
        'operators of a forward, views left out': [f'{form["operators"]:,}' for form in every],
        'loads into the stock class, strict': ['yes' if form['loads'] else 'no' for form in every],
        'largest difference of an output from the plugged model': [number(form['difference']) for form in every],
    }


def panel(figures: dict[str, Any]) -> tuple[list[str], int]:
    """One model: three columns, and its height."""
    forms = figures['forms']
    lines = rows(forms)
    height = TOP + DIAGRAM + ROW * len(lines) + 20
    right = LEFT + 3 * COLUMN + 2 * GAP
    drawn = [
        text(LEFT, 42, figures['title'], 27, 'start', font_weight='700'),
        text(LEFT, 72, f'ASR(SE) at {figures["sites"]} sites; {figures["input"]}', 19, 'start', fill=GREY),
    ]
    for column, (form, use) in enumerate(FORMS.items()):
        x = LEFT + column * (COLUMN + GAP)
        drawn.append(box(x, TOP, COLUMN, DIAGRAM, STROKES[form]))
        drawn.append(text(x + COLUMN / 2, TOP + 31, form, 23, font_weight='700'))
        drawn.append(text(x + COLUMN / 2, TOP + 54, use, 17, fill=GREY))
        drawn += diagram(form, figures['site'], x + COLUMN / 2, TOP + 72)
    for row, (name, values) in enumerate(lines.items()):
        y = TOP + DIAGRAM + 10 + row * ROW
        if row:
            drawn.append(f'<line x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}" stroke="#d0d7de" stroke-width="1.5"/>')
        drawn.append(text(LEFT, y + 20, name, 16, 'start', fill=GREY))
        for column, value in enumerate(values):
            middle = LEFT + column * (COLUMN + GAP) + COLUMN / 2
            other = column == 1 and value != values[0]
            drawn.append(text(middle, y + 45, value, 21, font_weight='700' if other else '400'))
    return drawn, height


def picture(figures: list[dict[str, Any]], side_by_side: bool) -> str:
    """The whole picture as SVG."""
    panels = [panel(one) for one in figures]
    height = max(height for _, height in panels) if side_by_side else sum(height for _, height in panels) + 20
    width = WIDTH * len(panels) + 20 if side_by_side else WIDTH + 20
    groups = []
    for number, (drawn, own) in enumerate(panels):
        x, y = (number * WIDTH, 0) if side_by_side else (0, number * own)
        groups.append(f'<g transform="translate({x + 10} {y})">' + '\n'.join(drawn) + '</g>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height + 20}" role="img" font-family="{FONT}">'
        '<title>A detector and a UNet: stock, plugged with ASR(SE), and folded, with what each costs</title>\n'
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5" markerHeight="5" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>\n'
        f'<rect width="{width}" height="{height + 20}" rx="14" fill="#ffffff"/>\n'
    )
    return head + '\n'.join(groups) + '\n</svg>\n'


def write(figures: list[dict[str, Any]], folder: Path = ASSETS) -> None:
    """Write the pictures and their figures."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'overview.json').write_text(json.dumps(figures, indent=1) + '\n', encoding='utf-8')
    (folder / 'overview.svg').write_text(picture(figures, side_by_side=True), encoding='utf-8')
    (folder / 'overview-narrow.svg').write_text(picture(figures, side_by_side=False), encoding='utf-8')


if __name__ == '__main__':
    from handbook.figures import detector, unet

    write([asdict(detector()), asdict(unet())])
