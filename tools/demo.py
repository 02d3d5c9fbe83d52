"""Train detectors on embedded data, stock, with ASR(SE) and with DIA, fold, ship, compare: five minutes on two cores.

    python tools/demo.py
    python tools/demo.py --out runs/demo --epochs 3

Writes work_dirs/demo: shipped/ (stock checkpoints and configs), detections.png, summary.json. The exit code is 1 if the
folded detector does not equal the unfolded one or a detector has not learnt.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from asr_downstream import cli

ROOT = Path(__file__).resolve().parent.parent


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run the demo."""
    parser = cli.parser(__doc__)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/demo'), help='folder (default: work_dirs/demo)')
    parser.add_argument('--epochs', type=int, help="instead of the configs' own number")
    args = parser.parse_args(argv)
    warnings.filterwarnings('ignore', category=UserWarning, module=r'mm(engine|det|cv)|torch')

    from asr_downstream.detection.demo import run_demo

    summary = run_demo(args.out, ROOT / 'det_configs' / 'digits', ROOT / 'tools', args.epochs)
    failed = [name for name, held in summary['checks'].items() if not held]
    if failed:
        sys.exit(f'did not hold: {", ".join(failed)}')


if __name__ == '__main__':
    cli.run(main)
