"""Export a folded model to ONNX and torch.export, with a receipt that says how far the files are from torch.

    asr-downstream export shipped/detector.pth --to onnx,pt2 --data data/bccd --out exported/detector
    asr-downstream export shipped/detector.pth --int8 --data data/bccd --out exported/int8      # and 8 bits
    asr-downstream export shipped/digits --to onnx --data digits --out exported/unet         # a pipeline of diffusers
    asr-downstream export work_dirs/r56/shipped --to onnx,pt2 --data images.zip --out exported/r56      # a classifier
    asr-downstream export work_dirs/NAME/shipped/FAR-50 --to onnx --out exported/far

SHIPPED is what fold, train-cls or distill-far wrote; a model with gates is refused. Of detectors, feature maps and the
raw outputs of the first head are exported; with --data, RetinaNet, RTMDet and others of one kind also whole, as
detector.onnx: an image of 8 bits in; boxes, scores and labels out, and infer.py beside it, which runs the file where
there are onnxruntime, numpy and pillow. For a UNet, infer.py samples images.

OUT gets model.onnx (torch.onnx.export, dynamo) and model.pt2 (torch.export), and receipt.json: the largest difference
of the outputs to those of torch, relative to their size, on images of --data; sizes, latency in turns, opset, versions,
hashes. A file that differs by more than 1e-4 is an error: then OUT is not written, and the exit status is 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from asr_downstream.console import cli

NAMES = ('onnx', 'pt2')


def formats(text: str) -> list[str]:
    """Parse a list of formats, separated by commas."""
    found = list(dict.fromkeys(part.strip() for part in text.split(',')))
    if unknown := [name for name in found if name not in NAMES]:
        raise argparse.ArgumentTypeError(f'{unknown[0]!r} is none of {", ".join(NAMES)}')
    return found


def main(argv: Sequence[str] | None = None, names: cli.Names = str) -> None:
    """Parse the command line, export, print the receipt."""
    parser = cli.parser(__doc__, 'export', names)
    parser.add_argument('shipped', type=Path, metavar='SHIPPED', help='file or folder of a folded model')
    parser.add_argument('--to', type=formats, default=['onnx'], metavar='FORMATS', help='onnx, pt2 (default: onnx)')
    parser.add_argument('--out', type=Path, required=True, help='folder to write')
    parser.add_argument(
        '--data', type=Path, help='images to compare on: data set of a detector, folder, zip, or the word digits'
    )
    parser.add_argument('--images', type=cli.count, default=64, help='images of the data, at most (default: 64)')
    parser.add_argument('--int8', action='store_true', help='also ONNX of 8 bits, calibrated on the images')
    parser.add_argument('--threads', type=cli.count, default=1, help='of the times (default: 1)')
    parser.add_argument('--config', type=Path, help='of a detector, instead of the one beside SHIPPED')
    parser.add_argument('--trust', action='store_true', help='detector: read what needs unpickling (can run code)')
    args = parser.parse_args(argv)
    if args.int8 and (args.data is None or 'onnx' not in args.to):
        parser.error('--int8 goes with --to onnx and --data, whose images it is calibrated on')

    from asr_downstream.commands.exporting.kinds import kind_of
    from asr_downstream.commands.exporting.kinds.base import Request
    from asr_downstream.commands.exporting.run import check_out, export

    check_out(args.out)
    request = Request(args.shipped, args.data, args.images, args.config, args.trust)
    subject = kind_of(args.shipped).open(request)
    print(export(subject, args.to, args.out, args.threads, args.int8))
    print(args.out)
