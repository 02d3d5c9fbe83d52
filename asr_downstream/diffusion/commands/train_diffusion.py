"""Train a diffusion model of diffusers, stock or plugged, in one process or several of accelerate.

    asr-downstream train-diffusion unet-w32-asr-se_digits    # a ready config, by its name or path
    asr-downstream train-diffusion CONFIG --data /data/images --output-dir runs/a
    asr-downstream train-diffusion CONFIG --cfg-options learning_rate=1e-3 model.layers_per_block=1
    asr-downstream train-diffusion CONFIG --learns gates   # the rest is frozen; for model=dict(pretrained_...=...)
    asr-downstream train-diffusion CONFIG --dry-run        # config, sites, cost and memory; trains nothing
    asr-downstream train-diffusion CONFIG --resume         # from the newest complete checkpoint of the run

Several processes:

    python -m asr_downstream.console.torchrun --standalone --nproc_per_node 8 -m asr_downstream train-diffusion CONFIG
    accelerate launch --multi_gpu --num_processes 8 -m asr_downstream train-diffusion CONFIG

Keys of a config and their defaults: asr_downstream/diffusion/defaults.py and asr_downstream/engine/defaults.py. Data:
--data, or ASR_DATA_ROOT=/data for a config whose data.path is data/NAME.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from asr_downstream.console import cli
from asr_downstream.files.ready import find_config


def main(argv: Sequence[str] | None = None, names: cli.Names = str) -> None:
    """Parse the command line and train."""
    parser = cli.parser(__doc__, 'train-diffusion', names)
    parser.add_argument('config', type=Path, help='a file, or the name of a ready config')
    parser.add_argument('--data', type=Path, help='image folder or zip, instead of the one in the config')
    parser.add_argument('--output-dir', type=Path, help='logs and checkpoints (default: work_dirs/<config>)')
    parser.add_argument(
        '--resume', nargs='?', const='latest', metavar='CHECKPOINT', help="'latest' (the default) or a checkpoint"
    )
    parser.add_argument(
        '--learns',
        nargs='+',
        metavar='WHAT',
        help="gates, norms, bias, gates+norms or patterns of weights, 'conv_out.*' (default: all); the rest is frozen",
    )
    parser.add_argument('--seed', type=int, help='random seed, instead of the one in the config')
    parser.add_argument('--dry-run', action='store_true', help='print the plan and stop')
    cli.add_options(parser)
    args = parser.parse_args(argv)

    from asr_downstream.diffusion.config import load_config

    given = {'seed': args.seed, 'learns': args.learns}
    options = dict(args.cfg_options or {}) | {key: value for key, value in given.items() if value is not None}
    config = load_config(find_config(args.config, 'diffusion/configs'), options, args.data)
    if args.output_dir is not None:
        config.output_dir = str(args.output_dir)
    if args.dry_run:
        from asr_downstream.diffusion.training.plan import plan

        print(plan(config))
        return
    from asr_downstream.diffusion.training.train import train
    from asr_downstream.engine.launch import end_processes
    from asr_downstream.errors import CompleteError

    said = []
    try:
        checkpoint = train(config, args.resume)
    except CompleteError as complete:  # is no failure to a job that is started again until it is done
        said, checkpoint = [str(complete)], complete.checkpoint
    end_processes()
    if not sys.stdout.closed and not int(os.environ.get('RANK', '0')):
        print(*said, f'last checkpoint: {checkpoint}', sep='\n')
