"""Export one detector of each family of det_configs, built small, and print what of it is exported.

python tools/exports.py                              # about ten minutes
python tools/exports.py --case retinanet rtmdet
python tools/exports.py --page docs/export.md        # and writes the table into that page
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asr_downstream.console import cli

BEGIN, END = '<!-- detectors: written by tools/exports.py -->', '<!-- end -->'


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, export, print."""
    parser = cli.parser(__doc__)
    parser.add_argument('--case', nargs='+', metavar='NAME', help='only those whose names contain one of these')
    parser.add_argument('--page', type=Path, metavar='FILE', help='a page whose table is written anew')
    args = parser.parse_args(argv)

    from bench.exports import CASES, markdown, measure

    from asr_downstream.errors import AsrError
    from asr_downstream.files.atomic import write_atomically

    cases = [case for case in CASES if not args.case or any(name in case for name in args.case)]
    rows = []
    for row in measure(cases):
        rows.append(row)
        print(markdown([row]).splitlines()[-1], flush=True)
    if args.page:
        before, mark, rest = args.page.read_text(encoding='utf-8').partition(BEGIN)
        _, end, after = rest.partition(END)
        if not end:
            raise AsrError(f'{args.page}: has no {BEGIN} ... {END}, between which the table would go')
        content = f'{before}{mark}\n\n{markdown(rows)}\n\n{end}{after}'
        write_atomically(args.page, lambda path: path.write_text(content, encoding='utf-8'))


if __name__ == '__main__':
    cli.run(main)
