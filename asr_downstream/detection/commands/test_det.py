"""Evaluate a detector; with --fold, compare it with its folded, stock self.

    asr-downstream test-det CONFIG work_dirs/NAME/epoch_10.pth
    asr-downstream test-det CONFIG work_dirs/NAME/epoch_10.pth --fold
    asr-downstream test-det CONFIG work_dirs/NAME/epoch_10.pth --fold calibrated --calibrate 64
    asr-downstream test-det CONFIG work_dirs/NAME/epoch_10.pth --fold --per-class --show-dir pictures --fast --tta
    python -m torch.distributed.run --nproc_per_node 8 -m asr_downstream test-det CONFIG X.pth --launcher pytorch

Gates of ASR fold exactly. Gates that depend on the input (SE, DIA, ...) fold only by calibration: each is replaced by
its mean over training images, and the table shows what that costs.

Prints COCO metrics (AP and AR of boxes, and of masks if the config asks for them), parameters, multiply-adds and
latency, and with --fold the largest difference of boxes and scores. Writes the same, and AP by class, as test.json to
the work dir. pycocotools computes the metrics; --fast uses faster-coco-eval, which gives the same numbers. Several
processes share the images, in the batches of one, and give its numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asr_downstream.console import cli
from asr_downstream.files.ready import find_config


def main(argv: Sequence[str] | None = None, names: cli.Names = str) -> None:
    """Parse the command line, evaluate, print and write the table."""
    parser = cli.parser(__doc__, 'test-det', names)
    parser.add_argument('config', type=Path, help='config that the checkpoint was trained with, or its name')
    parser.add_argument('checkpoint', type=Path, help='.pth or .safetensors')
    parser.add_argument(
        '--fold',
        nargs='?',
        const='exact',
        choices=['exact', 'calibrated'],
        help='fold a copy and compare the two (default: exact)',
    )
    cli.add_calibration(parser)
    parser.add_argument('--fast', action='store_true', help='score with faster-coco-eval')
    parser.add_argument('--per-class', action='store_true', help='print AP class by class')
    parser.add_argument('--tta', action='store_true', help='also test with augmentation (the folded model, if folded)')
    parser.add_argument('--show-dir', type=Path, help='folder for pictures: unfolded beside folded detections')
    parser.add_argument('--show-images', type=cli.count, default=20, metavar='N', help='pictures (default: 20)')
    parser.add_argument('--data-root', type=Path, help='folder of the data set, instead of the one in the config')
    parser.add_argument('--work-dir', type=Path, help='where test.json goes (default: work_dirs/<config>)')
    parser.add_argument('--trust', action='store_true', help='read checkpoints that need unpickling (can run code)')
    cli.add_launcher(parser)
    cli.add_options(parser)
    args = parser.parse_args(argv)

    if args.fold != 'calibrated' and (args.calibrate or args.refine_norms or args.max_drop is not None):
        parser.error('--calibrate, --refine-norms and --max-drop go with --fold calibrated')
    from asr_downstream.console.processes import Processes, end_processes
    from asr_downstream.detection.config import load_config
    from asr_downstream.detection.evaluation.calibrate import CalibrationPlan
    from asr_downstream.detection.evaluation.test import TestPlan, evaluate_checkpoint
    from asr_downstream.detection.training.launch import start
    from asr_downstream.files.configs import work_dir_of

    config = load_config(find_config(args.config, 'det_configs'), args.data_root, args.cfg_options)
    calibration = CalibrationPlan(
        args.calibrate or 64, args.refine_norms, args.max_drop, evaluate=args.max_drop is not None
    )
    plan = TestPlan(
        args.fold, calibration, args.fast, args.tta, args.per_class, args.show_dir, args.show_images, args.trust
    )
    out = (args.work_dir or work_dir_of(config)) / 'test.json'
    start(config, args.launcher)
    processes = Processes.of_launch()
    text = processes.together(lambda: evaluate_checkpoint(config, args.checkpoint, out, plan, processes))
    end_processes()
    if processes.is_first:
        print(text)
