"""Fold a trained detector into the stock model.

    python tools/fold.py CONFIG work_dirs/NAME/epoch_10.pth shipped/detector.pth
    python tools/fold.py CONFIG work_dirs/NAME/epoch_10.pth shipped/detector.pth --calibrate 64 [--max-drop 0.01]

Writes shipped/detector.pth (or .safetensors), which the stock config loads with strict=True, that stock config as
shipped/detector.py, and shipped/fold_report.json: sites, measured errors, hashes, versions. What is shipped needs
MMDetection and nothing of this package.

The gates of ASR fold exactly. With --calibrate N, gates that depend on the input (SE, DIA, ...) are replaced by their
mean over N training images; how constant they were, and AP before and after, are printed and in the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmengine.config import DictAction

from asr_downstream import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and fold."""
    parser = cli.parser(__doc__)
    parser.add_argument('config', type=Path, help='config that the checkpoint was trained with')
    parser.add_argument('checkpoint', type=Path, help='checkpoint that training wrote')
    parser.add_argument('out', type=Path, help='file to write, .pth or .safetensors')
    cli.add_calibration(parser)
    parser.add_argument('--no-evaluate', action='store_true', help='do not measure AP before and after calibration')
    parser.add_argument('--data-root', type=Path, help='folder of the data set, instead of the one in the config')
    parser.add_argument('--trust', action='store_true', help='read checkpoints that need unpickling (can run code)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='override the config')
    args = parser.parse_args(argv)

    if not args.calibrate and (args.refine_norms or args.no_evaluate or args.max_drop is not None):
        parser.error('--refine-norms, --no-evaluate and --max-drop go with --calibrate N')
    from asr_downstream.detection.calibrating import CalibrationPlan
    from asr_downstream.detection.config import load_config
    from asr_downstream.detection.shipping import fold_checkpoint

    config = load_config(args.config, args.data_root, args.cfg_options, needs_data=bool(args.calibrate))
    plan = None
    if args.calibrate:
        plan = CalibrationPlan(args.calibrate, args.refine_norms, args.max_drop, not args.no_evaluate)
    result = fold_checkpoint(config, args.checkpoint, args.out, args.trust, plan)
    found = result['feature_map_difference']
    if plan is None:
        print(
            f'folded {len(result["sites"])} sites in {result["fold_seconds"]:.2f} s; relative difference of the '
            f'feature maps {found["float32"]["relative"]:.1e} in float32, {found["float64"]["relative"]:.1e} in float64'
        )
    else:
        print(result['report'])
    if result['still_plugged']:
        print(
            f'{args.out}: fits {args.out.with_suffix(".py")}, which needs asr_downstream for the sites that were kept'
        )
    else:
        print(f'{args.out}: loads strictly into the stock config {args.out.with_suffix(".py")}')
    print(f'{args.out.parent / "fold_report.json"}: sites, errors, hashes, versions')


if __name__ == '__main__':
    cli.run(main)
