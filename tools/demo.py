"""Train on embedded data, stock and with attention, fold, ship, compare.

    python tools/demo.py
    python tools/demo.py --only diffusion          # or far, or detection
    python tools/demo.py --out runs/demo --epochs 3 --steps 200

Diffusion: two UNets (stock, ASR(SE)); writes work_dirs/demo/diffusion/samples.png, shipped/, summary.json.
FAR: a ViT, its attention replaced by LSTMs, and half of their units pruned; writes work_dirs/demo/far/relations.png,
shipped/, summary.json.
Detection: three RetinaNets (stock, ASR(SE), DIA); writes work_dirs/demo/detections.png, shipped/, summary.json.
At the end work_dirs/demo/report.html has all of it: verdicts, curves, pictures.
The exit code is 1 if a folded model does not equal the unfolded one, a model has not learnt, or the pruned model is
more than one point below its teacher.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from asr_downstream.console import cli

ROOT = Path(__file__).resolve().parent.parent
PARTS = ('diffusion', 'far', 'detection')


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run the demo."""
    parser = cli.parser(__doc__)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/demo'), help='folder (default: work_dirs/demo)')
    parser.add_argument('--only', nargs='+', choices=PARTS, metavar='PART', help=f'some of: {", ".join(PARTS)}')
    parser.add_argument('--epochs', type=cli.count, help="detection: instead of the configs' own number")
    parser.add_argument('--steps', type=cli.count, default=800, help='diffusion: training steps (default: 800)')
    args = parser.parse_args(argv)
    warnings.filterwarnings('ignore', category=UserWarning, module=r'mm(engine|det|cv)|torch')

    failed = []
    parts = args.only or PARTS
    if 'diffusion' in parts:
        from demos.diffusion import run_demo as diffusion

        summary = diffusion(args.out / 'diffusion', ROOT / 'diffusion' / 'configs', ROOT / 'tools', args.steps)
        failed += [name for name, held in summary['checks'].items() if not held]
    if 'far' in parts:
        from demos.far import run_demo as far

        summary = far(args.out / 'far', ROOT / 'tools' / 'far_configs')
        failed += [name for name, held in summary['checks'].items() if not held]
    if 'detection' in parts:
        from demos.detection import run_demo as detection

        summary = detection(args.out, ROOT / 'det_configs' / 'digits', ROOT / 'tools', args.epochs)
        failed += [name for name, held in summary['checks'].items() if not held]
    print(f'{write_report(args.out)}: all of it in one file')
    if failed:
        sys.exit(f'did not hold: {", ".join(failed)}')


def write_report(out: Path) -> Path:
    """Write a page about the parts of the demo that are there."""
    from asr_downstream.commands.reports.find import sections_of
    from asr_downstream.commands.reports.render import write

    command = ' '.join(['python tools/demo.py', *sys.argv[1:]])
    write(out / 'report.html', sections_of([out]), 'Demo: train with attention, ship the stock model', command)
    return out / 'report.html'


if __name__ == '__main__':
    cli.run(main)
