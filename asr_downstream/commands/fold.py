"""Fold a trained detector or diffusion model into the stock model.

    asr-downstream fold CONFIG work_dirs/NAME/epoch_10.pth shipped/detector.pth     # a detector
    asr-downstream fold work_dirs/unet-w32-asr-se_digits shipped/digits             # a run of a diffusion model
    asr-downstream fold work_dirs/NAME shipped/NAME --calibrate 64                  # SE, DIA, ...: see below
    asr-downstream fold CONFIG CHECKPOINT OUT --native --calibrate 64               # attention of MMDetection's own
    asr-downstream fold work_dirs/NAME shipped/NAME --push-to-hub USER/NAME         # and what was written, to the hub
    asr-downstream fold apply BASE ADAPTER OUT --strength 0.7                       # an adapter, into a stock base

Detector: writes shipped/detector.pth (or .safetensors), which the stock config loads with strict=True, that stock
config as shipped/detector.py, shipped/fold_report.json and a model card. Loading them needs MMDetection and not this
package. A run without a plug, such as a stock baseline, is written as it is.

Diffusion: writes a folder that DDPMPipeline.from_pretrained('shipped/digits') loads, with a model card, samples.png
and fold_report.json. Loading it needs diffusers and not this package. A run without a plug is written as it is; one
whose attention is replaced (FAR) as a folder for asr_downstream.far.load_far.

The gates of ASR fold exactly. With --calibrate N, gates that depend on the input (SE, DIA, ...) are replaced by their
mean over N training images; how constant they were, and what that changes, is printed and in the report.

With --native, the attention that a stock detector has by itself (SELayer of EfficientNet, ChannelAttention of RTMDet)
is replaced by its mean in the same way, folded into the layers beside it, and removed from the model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from asr_downstream.commands import gates
from asr_downstream.console import cli
from asr_downstream.errors import AsrError
from asr_downstream.files.hub import check_repo, files_under, push
from asr_downstream.files.ready import find_config

OF_DETECTORS = ('native', 'refine_norms', 'max_drop', 'no_evaluate', 'data_root', 'trust', 'cfg_options')


def main(argv: Sequence[str] | None = None, names: cli.Names = str) -> None:
    """Parse the command line and fold."""
    words = sys.argv[1:] if argv is None else [*argv]
    if words[:1] == ['apply']:
        gates.main(words, names)
        return
    parser = cli.parser(__doc__, 'fold', names)
    parser.add_argument(
        'paths', type=Path, nargs='+', metavar='PATH', help='CONFIG CHECKPOINT OUT of a detector, or RUN OUT'
    )
    cli.add_calibration(parser)
    parser.add_argument(
        '--native', action='store_true', help="detector: remove the attention of MMDetection's own; with --calibrate N"
    )
    parser.add_argument('--no-evaluate', action='store_true', help='detector: no AP before and after calibration')
    parser.add_argument('--data-root', type=Path, help="detector: folder of the data set, instead of the config's")
    parser.add_argument('--data', type=Path, help="diffusion: images to calibrate with, instead of the config's")
    parser.add_argument('--weights', choices=['ema', 'raw'], help='diffusion: default: the average, if there is one')
    parser.add_argument('--license', metavar='ID', help='for the model card, such as apache-2.0')
    parser.add_argument('--base-model', metavar='ID', help='for the card: what the training started from')
    parser.add_argument('--dataset', action='append', metavar='ID', help='for the card; may be repeated')
    parser.add_argument('--tag', action='append', metavar='TAG', help='for the card; may be repeated')
    parser.add_argument('--trust', action='store_true', help='detector: read what needs unpickling (can run code)')
    cli.add_hub(parser)
    cli.add_options(parser, 'detector: override the config')
    args = parser.parse_args(words)

    if not args.calibrate and (args.refine_norms or args.no_evaluate or args.max_drop is not None):
        parser.error('--refine-norms, --no-evaluate and --max-drop go with --calibrate N')
    if args.native and not args.calibrate:
        parser.error('--native goes with --calibrate N, the training images that gates are averaged over')
    if args.native and args.refine_norms:
        parser.error('--refine-norms is for plugged models, not for --native')
    if args.private and not args.push_to_hub:
        parser.error('--private goes with --push-to-hub REPO')
    if args.push_to_hub:
        check_repo(args.push_to_hub)
    if len(args.paths) == 2:
        refuse(parser, args, 'a detector', OF_DETECTORS)
        if args.data and not args.calibrate:
            parser.error('--data goes with --calibrate N')
        fold_run(args)
    elif len(args.paths) == 3:
        refuse(parser, args, 'a diffusion model', ('data', 'weights'))
        fold_detector(args)
    else:
        parser.error('expected RUN OUT, or CONFIG CHECKPOINT OUT')


def refuse(parser: argparse.ArgumentParser, args: argparse.Namespace, of: str, names: tuple[str, ...]) -> None:
    """Refuse options that would do nothing."""
    for name in names:
        if getattr(args, name) not in (None, False):
            parser.error(f'--{name.replace("_", "-")} is for {of}')


def fold_run(args: argparse.Namespace) -> None:
    """Fold a run of `asr-downstream train-diffusion`."""
    path, out = args.paths
    if path.is_file():
        raise AsrError(f'{path}: is a file; expected RUN OUT, or for a detector CONFIG CHECKPOINT OUT')
    from asr_downstream.diffusion.card import Metadata
    from asr_downstream.diffusion.export import fold_and_ship
    from asr_downstream.diffusion.runs import load_run
    from asr_downstream.files.atomic import check_writable

    check_writable(out.absolute().parent)
    run = load_run(path, (args.data or True) if args.calibrate else False, cli.ema(args))
    metadata = Metadata(args.license, args.base_model, tuple(args.dataset or ()), tuple(args.tag or ()))
    result = fold_and_ship(run, out, args.calibrate, metadata)
    if result.get('replaced'):
        print(f'{out}: {result["model"]} with replaced attention, for asr_downstream.far.export.load_far, and a card')
    elif not result['sites'] or result['difference'] is None:
        print(result['report'])
    else:
        found = result['difference']
        print(
            f'folded {len(result["sites"])} sites in {result["fold_seconds"]:.2f} s; relative difference of the '
            f'predictions {found["float32"]["model"]:.1e} in float32, {found["float64"]["model"]:.1e} in float64'
        )
    if not result.get('replaced'):
        kind = (
            'a pipeline of diffusers' if result['pipeline'] else f'a {result["model"]} and its scheduler, for diffusers'
        )
        print(f'{out}: {kind}, model card, fold_report.json')
    pushed(args, lambda: files_under(out))


def fold_detector(args: argparse.Namespace) -> None:
    """Fold a checkpoint of `asr-downstream train-det`."""
    given, checkpoint, out = args.paths
    config_file = find_config(given, 'det_configs')
    from asr_downstream.detection.config import load_config
    from asr_downstream.detection.evaluation.calibrate import CalibrationPlan
    from asr_downstream.detection.export import fold_checkpoint

    config = load_config(config_file, args.data_root, args.cfg_options, needs_data=bool(args.calibrate))
    plan = None
    if args.calibrate:
        plan = CalibrationPlan(args.calibrate, args.refine_norms, args.max_drop, not args.no_evaluate)
    card = {'license': args.license, 'base_model': args.base_model, 'datasets': args.dataset, 'tags': args.tag}
    if args.native and plan is not None:
        from asr_downstream.detection.native import remove_attention

        removed = remove_attention(config, checkpoint, out, plan, args.trust, card)
        print_removed(removed, out)
        pushed(args, lambda: detector_files(out, removed['card']))
        return
    result = fold_checkpoint(config, checkpoint, out, args.trust, plan, card)
    found = result['feature_map_difference']
    if not result['sites']:
        print(f'nothing to fold, the model of {config_file} has no gates: the weights are shipped as they are')
    elif plan is None:
        print(
            f'folded {len(result["sites"])} sites in {result["fold_seconds"]:.2f} s; relative difference of the '
            f'feature maps {found["float32"]["relative"]:.1e} in float32, {found["float64"]["relative"]:.1e} in float64'
        )
    else:
        print(result['report'])
    if result['still_plugged']:
        print(f'{out}: fits {out.with_suffix(".py")}, which needs asr_downstream for the sites that were kept')
    else:
        print(f'{out}: loads strictly into the stock config {out.with_suffix(".py")}')
    print(
        f'{out.parent / "fold_report.json"}: sites, errors, hashes, versions; {out.parent / result["card"]}: model card'
    )
    pushed(args, lambda: detector_files(out, result['card']))


def detector_files(out: Path, card: str) -> dict[str, Path]:
    """What was written of a detector, under its names in a repository."""
    files = [out, out.with_suffix('.py'), out.parent / 'fold_report.json']
    return {'README.md': out.parent / card, **{path.name: path for path in files}}


def pushed(args: argparse.Namespace, files: Callable[[], dict[str, Path]]) -> None:
    """Push what was written, if that is wanted."""
    if args.push_to_hub:
        print(push(files(), args.push_to_hub, args.private))


def print_removed(result: dict[str, Any], out: Path) -> None:
    """Print what was removed from a detector, and how what is left is loaded."""
    print(result['report'])
    config = out.with_suffix('.py')
    if result['removed_attention']:
        print(f'{out}: fits {config} once the blocks that it names are nn.Identity; {result["card"]} has the lines')
    else:
        print(f'{out}: loads strictly into the stock config {config}, which builds no such attention')
    print(f'{out.parent / "fold_report.json"}: blocks, ratios, errors, hashes, versions')
