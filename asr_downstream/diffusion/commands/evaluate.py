"""Evaluate runs: FID and KID, speed and cost; with --fold, compare each model with its folded, stock self.

    asr-downstream evaluate work_dirs/unet-w32-asr-se_digits --fold
    asr-downstream evaluate RUN --fold calibrated --calibrate 64     # gates that depend on the input: SE, DIA, ...
    asr-downstream evaluate RUN_A RUN_B RUN_B/checkpoint-500 --num-samples 5000 --data /data/cifar10.zip
    asr-downstream evaluate RUN --sampler DPM-Solver++ --steps 20 --sampler-kwargs thresholding=True
    asr-downstream evaluate RUN --extractor inception:pt_inception-2015-12-05-6726825d.pth
    asr-downstream evaluate RUN_A RUN_B --show                       # what was measured before
    python -m asr_downstream.console.torchrun --standalone --nproc_per_node 8 -m asr_downstream evaluate RUN

The default extractor is a small encoder that is trained on the data once and kept with the first run; it compares
models on one data set and is not the Inception of the literature. Numbers go to RUN/evaluation.json with everything
that they depend on; numbers that were measured differently are never put into one table. Several processes share the
sampling; the first one measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asr_downstream.console import cli


def main(argv: Sequence[str] | None = None, names: cli.Names = str) -> None:
    """Parse the command line, evaluate, print the tables."""
    parser = cli.parser(__doc__, 'evaluate', names)
    parser.add_argument('runs', type=Path, nargs='+', metavar='RUN', help='folders of runs or of checkpoints')
    parser.add_argument(
        '--fold', nargs='?', const='exact', choices=['exact', 'calibrated'], help='compare with the folded model'
    )
    parser.add_argument(
        '--calibrate', type=cli.count, default=64, metavar='N', help='images for --fold calibrated (default: 64)'
    )
    parser.add_argument('--metrics', default='fid,kid', help='of fid, kid (default: both), and your own')
    parser.add_argument(
        '--extractor',
        default='encoder',
        help="'encoder' (default), the run or file of one, 'inception' or 'inception:WEIGHTS'",
    )
    cli.add_sampling(parser, num_samples=1000)
    parser.add_argument('--data', type=Path, help='image folder or zip, instead of the one in the config')
    parser.add_argument('--workers', type=cli.number, default=1, help='of the loader of the real images (default: 1)')
    parser.add_argument('--show', action='store_true', help='print earlier results and stop')
    args = parser.parse_args(argv)

    from asr_downstream.diffusion.evaluation.evaluate import Plan, evaluate_runs
    from asr_downstream.diffusion.evaluation.results import read_results, tables
    from asr_downstream.engine.launch import end_processes, start_sharing
    from asr_downstream.engine.state.checkpoints import run_of

    if args.show:
        found = [result for path in dict.fromkeys(map(run_of, args.runs)) for result in read_results(path)]
        print(tables(found) or 'nothing was measured yet')
        return
    plan = Plan(
        metrics=tuple(filter(None, args.metrics.split(','))),
        num_samples=args.num_samples,
        sampler=args.sampler,
        sampler_kwargs=args.sampler_kwargs or {},
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        extractor=args.extractor,
        ema=cli.ema(args),
        fold=args.fold,
        calibrate=args.calibrate,
        batch_size=args.batch_size,
        workers=args.workers,
    )
    processes = start_sharing()
    found = processes.together(lambda: evaluate_runs(args.runs, plan, args.data, processes))
    end_processes()
    if processes.is_first:
        print(tables(found))
