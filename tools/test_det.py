"""Evaluate a detector; with --fold, the detector beside its folded, stock self.

    python tools/test_det.py CONFIG work_dirs/NAME/epoch_10.pth
    python tools/test_det.py CONFIG work_dirs/NAME/epoch_10.pth --fold

Prints COCO metrics (pycocotools), parameters, multiply-adds and latency, and with --fold the largest difference of
boxes and scores; writes the same as test.json to the work dir.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmengine.config import DictAction

from asr_downstream import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, evaluate, print and write the table."""
    parser = cli.parser(__doc__)
    parser.add_argument('config', type=Path, help='config that the checkpoint was trained with')
    parser.add_argument('checkpoint', type=Path, help='.pth or .safetensors')
    parser.add_argument('--fold', action='store_true', help='fold a copy and compare the two')
    parser.add_argument('--data-root', type=Path, help='folder of the data set, instead of the one in the config')
    parser.add_argument('--work-dir', type=Path, help='where test.json goes (default: work_dirs/<config>)')
    parser.add_argument('--trust', action='store_true', help='read checkpoints that need unpickling (can run code)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='override the config')
    args = parser.parse_args(argv)

    from asr_downstream.detection import evaluation
    from asr_downstream.detection.config import load_config

    config = load_config(args.config, args.data_root, args.cfg_options)
    folder = evaluation.work_dir_of(config, args.work_dir)
    print(evaluation.evaluate_checkpoint(config, args.checkpoint, folder / 'test.json', args.fold, args.trust))


if __name__ == '__main__':
    cli.run(main)
