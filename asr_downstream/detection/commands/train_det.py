"""Train a detector, stock or plugged, with MMDetection's own configs and Runner.

    asr-downstream train-det retinanet_r18-w16-asr-se_fpn_digits    # a ready config, by its name or path
    asr-downstream train-det CONFIG --data-root /data/coco --work-dir runs/a --amp
    asr-downstream train-det CONFIG --cfg-options train_cfg.max_epochs=3 optim_wrapper.optimizer.lr=0.01
    asr-downstream train-det CONFIG --load-from stock.pth --val-first   # with preserve=True: the AP of stock.pth
    asr-downstream train-det CONFIG --load-from stock.pth --learns gates           # the rest of the model is frozen
    asr-downstream train-det CONFIG --load-from stock.pth --learns gates 'bbox_head.*'
    asr-downstream train-det CONFIG --resume            # continue from the newest checkpoint in the work dir
    asr-downstream train-det CONFIG --resume auto       # the same if there is one, else start
    asr-downstream train-det CONFIG --dry-run           # sites, parameters, what learns; trains nothing

Several processes, GPUs or without any the CPU:

    python -m asr_downstream.console.torchrun --standalone --nproc_per_node 8 -m asr_downstream train-det CONFIG \\
      --launcher pytorch --auto-scale-lr

Data: --data-root, or ASR_DATA_ROOT=/data for a config whose data_root is data/NAME/.

Ctrl-C or a termination ends the training after the step, with a checkpoint that --resume continues from, within the
epoch, as if there had been no stop; the exit status is 130 or 143, so that a loop over seeds ends too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asr_downstream.console import cli
from asr_downstream.console.stopping import Stopped
from asr_downstream.errors import AsrError
from asr_downstream.files.ready import find_config


def main(argv: Sequence[str] | None = None, names: cli.Names = str) -> None:
    """Parse the command line and train."""
    parser = cli.parser(__doc__, 'train-det', names)
    parser.add_argument('config', type=Path, help='MMDetection config: a file, or the name of a ready one')
    parser.add_argument('--work-dir', type=Path, help='logs and checkpoints (default: work_dirs/<config>)')
    parser.add_argument('--data-root', type=Path, help='folder of the data set, instead of the one in the config')
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the lr to the batch size in use')
    parser.add_argument(
        '--resume', nargs='?', const='latest', metavar='auto|CHECKPOINT', help='continue a training (default: newest)'
    )
    parser.add_argument('--load-from', metavar='CHECKPOINT', help='start from these weights; stock ones have no gates')
    parser.add_argument(
        '--learns',
        nargs='+',
        metavar='WHAT',
        help="gates, norms, bias, gates+norms or patterns of weights, 'bbox_head.*' (default: all); the rest is frozen",
    )
    parser.add_argument('--val-first', action='store_true', help='validate before the first step too')
    parser.add_argument('--ema', action='store_true', help='average the weights; checkpoints and AP are of the average')
    parser.add_argument('--fold-eval', action='store_true', help='validate a folded copy')
    parser.add_argument('--report-to', nargs='+', default=[], choices=['tensorboard', 'wandb'], help='besides the log')
    cli.add_launcher(parser)
    parser.add_argument('--seed', type=int, help='random seed, instead of the one in the config')
    parser.add_argument(
        '--trust', action='store_true', help='read checkpoints that need unpickling, or are fetched (can run code)'
    )
    parser.add_argument('--dry-run', action='store_true', help='print the plan and stop')
    cli.add_options(parser)
    args = parser.parse_args(argv)

    from asr_downstream.detection.config import load_config
    from asr_downstream.detection.training import checkpoints
    from asr_downstream.detection.training import launch as processes
    from asr_downstream.detection.training import train as training
    from asr_downstream.detection.training.loops import ValFirst
    from asr_downstream.files.configs import work_dir_of

    options = dict(args.cfg_options or {}) | ({} if args.learns is None else {'learns': args.learns})
    config = load_config(find_config(args.config, 'det_configs'), args.data_root, options)
    if args.amp:
        config.optim_wrapper.type = 'AmpOptimWrapper'
    if args.auto_scale_lr:
        if 'base_batch_size' not in (config.get('auto_scale_lr') or {}):
            raise AsrError(
                f'{args.config}: --auto-scale-lr needs the batch size that the lr is meant for: '
                f'--cfg-options auto_scale_lr.base_batch_size=16'
            )
        config.auto_scale_lr.enable = True
    if args.seed is not None:
        config.randomness = {**(config.get('randomness') or {}), 'seed': args.seed}
    if args.load_from:
        config.load_from = args.load_from
    if args.ema:
        training.average(config)
    if args.fold_eval:
        config.fold_eval = True
    training.report_to(config, args.report_to)
    if args.dry_run:
        print(training.plan(config, args.trust))
        return
    processes.join(config, args.launcher)
    training.prepare(config, args.work_dir or work_dir_of(config), args.resume, args.trust)
    try:
        checkpoint = training.train(config, [ValFirst()] if args.val_first else [])
    except Stopped:
        if processes.is_first(config):
            print(f'stopped; --resume continues from {checkpoints.noted(Path(config.work_dir))}')
        raise
    if processes.is_first(config):
        print(f'last checkpoint: {checkpoint or "none, the config writes none (default_hooks.checkpoint)"}')
