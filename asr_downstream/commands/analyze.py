"""Measure what attention does in trained models: tables, JSON, and figures as SVG and PNG.

    asr-downstream analyze stripes work_dirs/retinanet_r18-w32-se_fpn_bccd --data data/bccd --images 128
    asr-downstream analyze noise stock=work_dirs/a ASR=work_dirs/b --fold --kinds gaussian batch-norm
    asr-downstream analyze correlation SE=work_dirs/a DIA=work_dirs/b --out work_dirs/alike       # names for figures

stripes: do the gates depend on the image? Heat maps of images by channels, the deviation of each channel, the stripe
ratio (0: constant gates; 1: gates move as much as channels differ), and the metric after every gate was replaced by its
mean over images. Of diffusion models also by timestep. Attention that a library's model has by itself is seen too.

correlation: Pearson's correlation over channels between the gates of the sites of each stage, mean over images.

cost: what attention adds at each site: parameters, multiply-adds, launches, saved activations, latency of a batch.

noise (detectors, classifiers): the metric under noise of growing strength. On images constant, Gaussian, and salt and
pepper; on the statistics of batch norms; and attacks on the loss, FGSM and PGD. All runs see the same noise.

relations (FAR): which token looks at which, in the teacher and in its models: similarity, and how far tokens look.

RUN is the folder of a training, a checkpoint in it, or a file of weights with the config of a detector beside it.
NAME=RUN names it in tables and figures. --images is the number of training images that gates are looked at on; a metric
is taken on the images that the run is judged by: AP on the test set of a detector, accuracy on what a classifier holds
out, the denoising loss of a diffusion model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from asr_downstream.console import cli

WORDS = {
    'stripes': 'do gates depend on the image',
    'correlation': 'how alike are the gates of the sites of a stage',
    'cost': 'what attention costs, site by site',
    'noise': 'how much of the metric is left under noise',
    'relations': 'who looks at whom in a FAR family',
}
NOISES = ('constant', 'gaussian', 'salt-and-pepper', 'batch-norm', 'fgsm', 'pgd')
# Options of one analysis, under the names of the arguments of its function.
OWN = {'stripes': ('metric',), 'cost': ('rounds',), 'noise': ('kinds', 'fold', 'seed')}


def main(argv: Sequence[str] | None = None, names: cli.Names = str) -> None:
    """Parse the command line, measure, draw, print."""
    parser = cli.parser(__doc__, 'analyze', names)
    words = parser.add_subparsers(dest='word', required=True, metavar='|'.join(WORDS))
    parsers = {}
    for word, line in WORDS.items():
        about = next(part for part in (__doc__ or '').split('\n\n') if part.startswith(word))
        parsers[word] = words.add_parser(word, help=line, description=about, epilog='analyze --help has examples')
        add_common(parsers[word])
    parsers['stripes'].add_argument(
        '--no-metric', dest='metric', action='store_false', help='only the gates and the outputs'
    )
    parsers['cost'].add_argument('--rounds', type=cli.count, default=30, help='of timing, in turns (default: 30)')
    parsers['noise'].add_argument(
        '--kinds', nargs='+', choices=NOISES, metavar='NOISE', help=f'of {", ".join(NOISES)} (default: all)'
    )
    parsers['noise'].add_argument('--fold', action='store_true', help='measure a folded copy of each run beside it')
    parsers['noise'].add_argument('--seed', type=int, default=0, help='of the noise (default: 0)')
    args = parser.parse_args(argv)

    from asr_downstream.folding.analysis import suite
    from asr_downstream.folding.analysis.runs import Wanted, names_of

    out = args.out or Path('work_dirs/analysis') / args.word
    wanted = Wanted(args.images, args.data, args.config, cli.ema(args), args.trust)
    own = {key: value for key, value in vars(args).items() if key in OWN.get(args.word, ())}
    job = suite.Job(names_of(args.runs), out, wanted, args.kind)
    if args.word == 'relations':
        from asr_downstream.far.evaluation.relations import relations

        print(relations(job))
    else:
        print(getattr(suite, args.word)(job, **own))
    print(f'{out}: {args.word}.json and figures')


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options that all analyses have."""
    parser.add_argument('runs', nargs='+', metavar='[NAME=]RUN', help='folders of trainings, checkpoints, weights')
    parser.add_argument('--data', type=Path, help='data set, instead of the one in the config')
    parser.add_argument('--images', type=cli.count, default=256, help='to look at gates on (default: 256)')
    parser.add_argument('--out', type=Path, help='folder to write (default: work_dirs/analysis/WORD)')
    parser.add_argument('--config', type=Path, help='detector: config of weights that have none beside them')
    parser.add_argument('--weights', choices=['ema', 'raw'], help='default: the average, if the run has one')
    parser.add_argument('--kind', help='of run: detection, diffusion, ... (default: what the files say)')
    parser.add_argument('--trust', action='store_true', help='detector: read what needs unpickling (can run code)')
