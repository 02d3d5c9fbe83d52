"""Which backbones of the installed MMDetection can be plugged, where, and whether they fold: found out by doing it.

    python tools/backbones.py                  # all families, small, with random weights; about a minute
    python tools/backbones.py --name Swin PVT
    python tools/backbones.py --markdown       # the table of det_configs/README.md

For each: sites, stock weights loaded, one training step that moves all gates, the folded model equal to the plugged one
in float64 and loaded strictly into the stock class. Ends with status 1 if something promised does not hold.
"""

from __future__ import annotations

from collections.abc import Sequence

from asr_downstream.console import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, check, print."""
    parser = cli.parser(__doc__)
    parser.add_argument('--name', nargs='+', help='only backbones whose names contain one of these')
    parser.add_argument('--markdown', action='store_true', help='print the table for the documentation')
    args = parser.parse_args(argv)

    from matrix.backbones import BACKBONES, check, markdown
    from rich.table import Table

    from asr_downstream.console.progress import bar
    from asr_downstream.console.text import render

    chosen = [b for b in BACKBONES if not args.name or any(n.lower() in b.name.lower() for n in args.name)]
    if not chosen:
        parser.error(f'--name matches none of: {", ".join(b.name for b in BACKBONES)}')
    rows = [check(backbone) for backbone in (chosen if args.markdown else bar(chosen, 'backbones'))]
    if args.markdown:
        print(markdown(rows))
        return
    table = Table('backbone', 'block', 'sites', 'number', 'folded differs by', 'also trains')
    for row in rows:
        if row.reason:
            table.add_row(row.name, '', row.reason)
        else:
            sites = ', '.join(row.sites)
            table.add_row(row.name, row.block, sites, str(row.count), f'{row.difference:.0e}', ', '.join(row.dynamic))
    print(render(table))


if __name__ == '__main__':
    cli.run(main)
