"""Find objects in images: COCO's JSON with scores, and a picture of each image.

    asr-downstream predict CONFIG shipped/detector.pth photos/ --out found
    asr-downstream predict CONFIG CHECKPOINT a.jpg b.jpg --threshold 0.5 --no-pictures
    asr-downstream predict CONFIG CHECKPOINT data/bccd/val --annotations data/bccd/annotations/val.json

CONFIG is what the checkpoint was trained with, or shipped beside it. Folders are looked through with all below them.
Writes predictions.json to --out, a COCO file whose annotations have scores, of all that the detector gives, and
pictures/, with what is annotated beside what is found if --annotations is given; then ids of images and categories are
those of that file. An image that cannot be read is named and left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asr_downstream.console import cli
from asr_downstream.files.ready import find_config


def main(argv: Sequence[str] | None = None, names: cli.Names = str) -> None:
    """Parse the command line, detect, write, print what was found."""
    parser = cli.parser(__doc__, 'predict', names)
    parser.add_argument('config', type=Path, help='config of the detector, or its name')
    parser.add_argument('checkpoint', type=Path, help='.pth or .safetensors')
    parser.add_argument('images', type=Path, nargs='+', help='image files, and folders of them')
    parser.add_argument('--out', type=Path, default=Path('predictions'), help='folder (default: predictions)')
    parser.add_argument('--annotations', type=Path, help='COCO file with what is in the images')
    parser.add_argument(
        '--threshold', type=cli.part, default=0.3, help='smallest score drawn and counted (default: 0.3)'
    )
    parser.add_argument('--batch-size', type=cli.count, default=1, metavar='N', help='images at a time (default: 1)')
    parser.add_argument('--no-pictures', action='store_true', help='write the JSON alone')
    parser.add_argument('--trust', action='store_true', help='read checkpoints that need unpickling (can run code)')
    cli.add_options(parser)
    args = parser.parse_args(argv)

    from asr_downstream.detection.config import load_config
    from asr_downstream.detection.models.detectors import load_detector
    from asr_downstream.detection.prediction.images import Truth, find_images
    from asr_downstream.detection.prediction.write import predict_images
    from asr_downstream.files.atomic import check_could_write, sha256

    images = find_images(args.images, without=args.out)
    truth = Truth(args.annotations, list(images)) if args.annotations else None
    check_could_write(args.out)
    config = load_config(find_config(args.config, 'det_configs'), None, args.cfg_options, needs_data=False)
    model, _ = load_detector(config, args.checkpoint, args.trust)
    about = {'config': str(args.config), 'checkpoint': str(args.checkpoint), 'sha256': sha256(args.checkpoint)}
    pictures = not args.no_pictures
    print(
        predict_images(config, model, images, args.out, truth, args.threshold, args.batch_size, pictures, about),
    )
