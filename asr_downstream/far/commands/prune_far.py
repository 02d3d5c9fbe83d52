"""Prune the hidden units of a distilled model: one run makes a family, FAR-75, FAR-50, FAR-25.

    asr-downstream prune-far vit-w64_digits --keep 0.75 0.5 0.25   # shares of the hidden units that stay
    asr-downstream prune-far CONFIG --parameters 0.6        # or a number of parameters, 5000000
    asr-downstream prune-far CONFIG --latency 0.5           # share of the time of a forward, measured on this machine
    asr-downstream prune-far CONFIG --threshold 0.3         # relative L2 norm of a unit's weights
    asr-downstream prune-far CONFIG --keep 0.5 --resume

CONFIG was distilled before: asr-downstream distill-far CONFIG. First the student is trained with the Hoyer-square
regulariser (OUT/sparse). Then, for each member, the units whose weights have the smallest L2 norms are removed, with
their biases, by one threshold for the whole model; the smaller model is fine-tuned (OUT/FAR-50) and written to
OUT/shipped/FAR-50. To compare them: asr-downstream evaluate-far OUT
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asr_downstream.console import cli
from asr_downstream.files.ready import find_config


def main(argv: Sequence[str] | None = None, names: cli.Names = str) -> None:
    """Parse the command line and prune."""
    parser = cli.parser(__doc__, 'prune-far', names)
    parser.add_argument('config', type=Path, help='config, or its name, that asr-downstream distill-far was run with')
    parser.add_argument('--data', type=Path, help='image folder or zip, instead of the one in the config')
    parser.add_argument('--output-dir', type=Path, help='folder of the stages (default: work_dirs/far/<config>)')
    shares: dict[str, Any] = dict(type=float, nargs='+', default=[], metavar='X')
    parser.add_argument('--keep', help='shares of the hidden units that stay', **shares)
    parser.add_argument('--parameters', help='parameters of the whole model, shares or numbers', **shares)
    parser.add_argument('--latency', help='shares of the time of a forward of one image, on the CPU', **shares)
    parser.add_argument('--threshold', help='thresholds', **shares)
    parser.add_argument(
        '--absolute', action='store_true', help='compare norms themselves, not relative to the largest of their head'
    )
    parser.add_argument('--resume', action='store_true', help='continue: what is finished stays')
    cli.add_options(parser)
    args = parser.parse_args(argv)

    from asr_downstream.engine.launch import end_processes
    from asr_downstream.far.config import load_config
    from asr_downstream.far.family import prune_family
    from asr_downstream.far.prune.budgets import Budget
    from asr_downstream.files.configs import work_dir_of

    budgets = [Budget('units' if kind == 'keep' else kind, value)
               for kind in ('keep', 'parameters', 'latency', 'threshold') for value in getattr(args, kind)]  # fmt: skip
    if not budgets:
        parser.error('say how small: --keep 0.5, --parameters 0.6, --latency 0.5 or --threshold 0.3')
    config = load_config(find_config(args.config, 'tools/far_configs'), args.cfg_options, args.data)
    for folder in prune_family(
        config, args.output_dir or work_dir_of(config, 'far'), budgets, args.resume, not args.absolute
    ):
        print(folder)
    end_processes()
