"""Write a report of runs: one HTML file with verdicts, arms, curves, pictures, cost and provenance.

    asr-downstream report work_dirs/demo --out report.html
    asr-downstream report work_dirs/ablation/retinanet_r18-w32_fpn_bccd runs/stock-s0 runs/asr-se-s0
    asr-downstream report work_dirs/unet-w32_digits work_dirs/far/vit-w64_digits --title 'Digits'

RUN is the folder of a training (detection, diffusion, FAR), of an ablation, of an analysis, of the demo, or a folder of
such folders. The file opens offline, in any browser and on a phone, in light and dark, and prints; there is no script
in it, and it loads nothing. Nothing in a run is executed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from asr_downstream.console import cli


def main(argv: Sequence[str] | None = None, names: cli.Names = str) -> None:
    """Parse the command line, read the runs, write the page."""
    parser = cli.parser(__doc__, 'report', names)
    parser.add_argument('runs', type=Path, nargs='+', metavar='RUN', help='folders of runs')
    parser.add_argument('--out', type=Path, default=Path('report.html'), help='file to write (default: report.html)')
    parser.add_argument('--title', help='of the page (default: the names of the runs)')
    parser.add_argument('--most-mb', type=cli.count, default=5, metavar='N', help='largest size, in MB (default: 5)')
    args = parser.parse_args(argv)

    from asr_downstream.commands.reports.find import sections_of
    from asr_downstream.commands.reports.render import write
    from asr_downstream.files.atomic import size

    sections = sections_of(args.runs)
    title = args.title or f'Report: {", ".join(run.resolve().name for run in args.runs[:4])}'
    about = f'{time.strftime("%Y-%m-%d %H:%M")}, {len(sections)} {"section" if len(sections) == 1 else "sections"}'
    written = write(args.out, sections, title, about, args.most_mb * 1_000_000)
    for section in sections:
        for verdict in section.verdicts[:1]:
            print(f'{section.title}: {verdict.text}')
    print(f'{args.out}: {size(written)}')
