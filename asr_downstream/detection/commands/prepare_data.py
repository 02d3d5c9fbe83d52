"""Make, check or convert the data of detection.

    asr-downstream prepare-data digits                       # 600 pictures of handwritten digits in data/digits
    asr-downstream prepare-data coco /data/coco              # check a COCO 2017 tree; says what is missing
    asr-downstream prepare-data coco /data/coco --unpack     # unpack its three archives first
    asr-downstream prepare-data check /data/cells            # check any set in COCO format, as --data-root takes it
    asr-downstream prepare-data voc /data/VOCdevkit          # write annotations/{train,val}.json in COCO format into it
    asr-downstream prepare-data voc /data/flat --split 0.8   # images and *.xml without ImageSets: 80 % for training
    asr-downstream prepare-data yolo /data/set/data.yaml     # YOLO's format: write annotations/ beside that file
    asr-downstream prepare-data degrade /data/cells data/dark-cells    # a blurred, dark and noisy copy, to adapt to

Nothing is downloaded. Data of diffusion models and of FAR is read as it is: a folder of images, or a zip.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asr_downstream.console import cli


def main(argv: Sequence[str] | None = None, names: cli.Names = str) -> None:
    """Parse the command line and prepare the data."""
    parser = cli.parser(__doc__, 'prepare-data', names)
    sets = parser.add_subparsers(dest='set', required=True, metavar='digits|coco|check|voc|yolo|degrade')
    digits = sets.add_parser('digits', help="make a detection set from scikit-learn's handwritten digits")
    digits.add_argument('out', type=Path, nargs='?', default=Path('data/digits'), help='folder (default: data/digits)')
    digits.add_argument('--seed', type=int, default=0, help='the same seed gives the same bytes')
    coco = sets.add_parser('coco', help='check or unpack COCO 2017')
    coco.add_argument('root', type=Path, nargs='?', default=Path('data/coco'), help='folder (default: data/coco)')
    coco.add_argument('--unpack', action='store_true', help='unpack the archives in it first')
    check = sets.add_parser('check', help='check any data set in COCO format')
    check.add_argument('root', type=Path, help='folder')
    voc = sets.add_parser('voc', help='convert PASCAL VOC to COCO format')
    voc.add_argument('root', type=Path, help='VOCdevkit, a year, or images and *.xml; annotations/ is written there')
    voc.add_argument('--split', type=cli.part, metavar='PART', help='without ImageSets: so much of it is for training')
    voc.add_argument('--seed', type=int, default=0, help='of that draw (default: 0)')
    voc.add_argument('--overwrite', action='store_true', help='replace annotations/{train,val}.json')
    yolo = sets.add_parser('yolo', help="convert YOLO's format to COCO format")
    yolo.add_argument(
        'root', type=Path, help='folder with a data.yaml, or that file; annotations/ is written beside it'
    )
    yolo.add_argument('--overwrite', action='store_true', help='replace annotations/{train,val}.json')
    worse = sets.add_parser('degrade', help='copy a set in COCO format with worse images and the same boxes')
    worse.add_argument('root', type=Path, help='folder of the set')
    worse.add_argument('out', type=Path, help='folder of the copy')
    for name, default, what in (
        ('--blur', (1.0, 3.0), 'standard deviation of the blur in px (1 3)'),
        ('--light', (0.3, 0.7), 'factor of the brightness (0.3 0.7)'),
    ):
        worse.add_argument(name, type=cli.finite, nargs=2, metavar=('LEAST', 'MOST'), default=default, help=what)
    worse.add_argument('--noise', type=cli.finite, default=4.0, help='standard deviation in grey levels (4)')
    worse.add_argument('--seed', type=int, default=0, help='the same seed gives the same pixels')
    args = parser.parse_args(argv)

    if args.set == 'degrade':
        from asr_downstream.detection.data.degrade import degrade_set

        made = degrade_set(args.root, args.out, tuple(args.blur), tuple(args.light), args.noise, args.seed)
        for split, path in made.items():
            print(f'{split}: {path}')
        return
    if args.set == 'digits':
        from asr_downstream.detection.data.digits import make_digits

        for split, path in make_digits(args.out, args.seed).items():
            print(f'{split}: {path}')
        return
    if args.set == 'voc':
        from asr_downstream.detection.data.convert.voc import convert_voc

        print('\n'.join(convert_voc(args.root, args.overwrite, args.split, args.seed)))
        return
    if args.set == 'yolo':
        from asr_downstream.detection.data.convert.yolo import convert_yolo

        print('\n'.join(convert_yolo(args.root, args.overwrite)))
        return
    from asr_downstream.detection.data.coco import check_tree, unpack

    if args.set == 'check':
        from asr_downstream.detection.data.check import check_set

        check_set(args.root)
        return
    if args.unpack:
        unpack(args.root)
    print('\n'.join(check_tree(args.root)))
