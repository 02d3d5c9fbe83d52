"""Train a diffusion model of diffusers, stock or plugged, in one process or several of accelerate.

    python diffusion/train.py diffusion/configs/unet-w32-asr-se_digits.py
    python diffusion/train.py CONFIG --data /data/images --output-dir runs/a
    python diffusion/train.py CONFIG --cfg-options learning_rate=1e-3 model.layers_per_block=1
    python diffusion/train.py CONFIG --dry-run        # config, sites, cost and memory; trains nothing
    python diffusion/train.py CONFIG --resume         # from the newest complete checkpoint of the run
    python -m asr_downstream.console.torchrun --nproc_per_node 8 diffusion/train.py CONFIG
    accelerate launch --multi_gpu --num_processes 8 diffusion/train.py CONFIG

Keys of a config and their defaults: asr_downstream/diffusion/defaults.py and asr_downstream/engine/defaults.py. Data:
--data, or ASR_DATA_ROOT=/data for a config whose data.path is data/NAME.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import DictAction

from asr_downstream.console import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = cli.parser(__doc__)
    parser.add_argument('config', type=Path, help='config, as in diffusion/configs/')
    parser.add_argument('--data', type=Path, help='image folder or zip, instead of the one in the config')
    parser.add_argument('--output-dir', type=Path, help='logs and checkpoints (default: work_dirs/<config>)')
    parser.add_argument(
        '--resume', nargs='?', const='latest', metavar='CHECKPOINT', help="'latest' (the default) or a checkpoint"
    )
    parser.add_argument('--seed', type=int, help='random seed, instead of the one in the config')
    parser.add_argument('--dry-run', action='store_true', help='print the plan and stop')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='override the config')
    args = parser.parse_args(argv)

    from asr_downstream.diffusion.config import load_config

    config = load_config(args.config, args.cfg_options, args.data)
    if args.output_dir is not None:
        config.output_dir = str(args.output_dir)
    if args.seed is not None:
        config.seed = args.seed
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


if __name__ == '__main__':
    cli.run(main)
