"""Fold a trained detector into the stock model.

    python tools/fold.py CONFIG work_dirs/NAME/epoch_10.pth shipped/detector.pth

Writes shipped/detector.pth (or .safetensors), which the stock config loads with strict=True, that stock config as
shipped/detector.py, and shipped/fold_report.json: sites, measured errors, hashes, versions. What is shipped needs
MMDetection and nothing of this package.
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
    parser.add_argument('--trust', action='store_true', help='read checkpoints that need unpickling (can run code)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='override the config')
    args = parser.parse_args(argv)

    from asr_downstream.detection.config import load_config
    from asr_downstream.detection.shipping import fold_checkpoint

    config = load_config(args.config, options=args.cfg_options, needs_data=False)
    report = fold_checkpoint(config, args.checkpoint, args.out, args.trust)
    difference = report['feature_map_difference']
    print(
        f'folded {len(report["sites"])} sites in {report["fold_seconds"]:.2f} s; relative difference of the feature '
        f'maps {difference["float32"]["relative"]:.1e} in float32, {difference["float64"]["relative"]:.1e} in float64\n'
        f'{args.out}: loads strictly into the stock config {args.out.with_suffix(".py")}\n'
        f'{args.out.parent / "fold_report.json"}: sites, errors, hashes, versions'
    )


if __name__ == '__main__':
    cli.run(main)
