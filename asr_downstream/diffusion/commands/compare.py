"""Compare runs: loss and FID by step, samples of the same noise by step, tables of what was evaluated.

    asr-downstream compare work_dirs/unet-w32_cifar10 work_dirs/unet-w32-asr-se_cifar10 --out work_dirs/compared

Writes curves.png, results.json and samples.png; a step at which a run has no samples is left empty. FID is shown for
the checkpoints that were evaluated before: asr-downstream evaluate RUN
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asr_downstream.console import cli


def main(argv: Sequence[str] | None = None, names: cli.Names = str) -> None:
    """Parse the command line, draw and print."""
    parser = cli.parser(__doc__, 'compare', names)
    parser.add_argument('runs', type=Path, nargs='+', metavar='RUN', help='folders of runs')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/compared'), help='folder (work_dirs/compared)')
    args = parser.parse_args(argv)

    from asr_downstream.diffusion.evaluation.compare import compare_runs

    print(compare_runs(args.runs, args.out))
    written = [name for name in ('curves.png', 'samples.png', 'results.json') if (args.out / name).is_file()]
    print(f'{args.out}: {", ".join(written)}')
