"""Train a detector, stock or plugged, with MMDetection's own configs and Runner.

    python tools/train_det.py det_configs/digits/retinanet_r18-w16-asr-se_fpn_digits.py
    python tools/train_det.py CONFIG --data-root /data/coco --work-dir runs/a --amp
    python tools/train_det.py CONFIG --cfg-options train_cfg.max_epochs=3 optim_wrapper.optimizer.lr=0.01
    python tools/train_det.py CONFIG --resume            # continue from the newest checkpoint in the work dir
    python tools/train_det.py CONFIG --dry-run           # sites, parameters and steps; trains nothing

Data: --data-root, or ASR_DATA_ROOT=/data for a config whose data_root is data/NAME/.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmengine.config import DictAction

from asr_downstream import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = cli.parser(__doc__)
    parser.add_argument('config', type=Path, help='MMDetection config')
    parser.add_argument('--work-dir', type=Path, help='logs and checkpoints (default: work_dirs/<config>)')
    parser.add_argument('--data-root', type=Path, help='folder of the data set, instead of the one in the config')
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the lr to the batch size in use')
    parser.add_argument('--resume', nargs='?', const='latest', metavar='CHECKPOINT', help='continue a training')
    parser.add_argument('--seed', type=int, help='random seed, instead of the one in the config')
    parser.add_argument('--trust', action='store_true', help='read checkpoints that need unpickling (can run code)')
    parser.add_argument('--dry-run', action='store_true', help='print the plan and stop')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='override the config')
    args = parser.parse_args(argv)

    from asr_downstream.detection import evaluation, training
    from asr_downstream.detection.config import load_config

    config = load_config(args.config, args.data_root, args.cfg_options)
    if args.amp:
        config.optim_wrapper.type = 'AmpOptimWrapper'
    if args.auto_scale_lr:
        config.auto_scale_lr.enable = True
    if args.seed is not None:
        config.randomness = {**config.get('randomness', {}), 'seed': args.seed}
    if args.dry_run:
        print(training.plan(config))
        return
    training.prepare(config, evaluation.work_dir_of(config, args.work_dir), args.resume, args.trust)
    print(f'last checkpoint: {training.train(config)}')


if __name__ == '__main__':
    cli.run(main)
