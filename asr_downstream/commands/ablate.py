"""Train arms over seeds, fold, evaluate, and say with intervals whether an attention helps here.

    asr-downstream ablate CONFIG --arms stock,se,asr-se --seeds 5 --jobs 2
    asr-downstream ablate CONFIG --data /data/bccd --seeds 3 --out runs/ablation     # all arms
    asr-downstream ablate CONFIG --arms stock,se,asr-se --dry-run        # sites and cost of every arm; trains nothing
    asr-downstream ablate CONFIG --arms stock,half=plugs/half.py --seeds 0,1,2       # a plug of your own
    asr-downstream ablate unet-w32_digits --cfg-options max_train_steps=500 --test='--num-samples 500 --steps 20'
    asr-downstream ablate --runs results.jsonl          # from results-det --out
    asr-downstream ablate --runs runs/a runs/b --reference stock --metric AP50       # from runs that are there

CONFIG is the stock config of a detector, a diffusion model or a classifier; the arms put their plugs into it:

ARMS

A config that starts from pretrained weights has arms whose gates start at one, so that all of them start from the same
model, and the arm `start` only where it is named.

What is compared is the difference to the reference of the same seed: a t interval for each arm, and a verdict with
Holm's correction over the arms. Fewer than three seeds give no verdict. Numbers are those of the last step.

Writes ablation.json, ablation.md and the figure ablation.svg and .png to --out. Started again, it goes on: runs that
have their numbers are passed over, the others continue. Ctrl-C stops the trainings, which write checkpoints.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from asr_downstream.console import cli
from asr_downstream.errors import AsrError, did_you_mean

PRESERVED = (
    'gates start at one (preserve=True), so that all arms start from the same model; --no-preserve gives them their '
    'own starts'
)
# Names for the help, which imports nothing; a test holds them to `asr_downstream.commands.ablation.arms.ARMS`.
ALL = 'stock,se,asr-se,dia,asr-dia,norm-affine,layerscale,sigmoidvector,start'


def seeds(text: str) -> list[int]:
    """Parse how many seeds, or which: ``5`` or ``0,1,2``."""
    parts = [part for part in text.split(',') if part]
    if not parts or not all(part.isdigit() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise argparse.ArgumentTypeError(f'{text!r} should be how many, such as 5, or which, such as 0,1,2')
    numbers = [int(part) for part in parts]
    if ',' in text:
        return numbers
    if not numbers[0]:
        raise argparse.ArgumentTypeError('at least one seed is needed')
    return list(range(numbers[0]))


def main(argv: Sequence[str] | None = None, names: cli.Names = str) -> None:
    """Parse the command line, train what is missing, compare, print and write."""
    parser = cli.parser((__doc__ or '').replace('ARMS', f'    {ALL.replace(",", ", ")}', 1), 'ablate', names)
    parser.add_argument('config', type=Path, nargs='?', help='stock config: a file, or the name of a ready one')
    parser.add_argument('--runs', type=Path, nargs='+', help='compare runs that are there, and train nothing')
    parser.add_argument('--arms', default=ALL, help='names of arms, and NAME=FILE with a plug (default: all)')
    parser.add_argument('--seeds', type=seeds, default=[0, 1, 2, 3, 4], help='how many, or which (default: 5)')
    parser.add_argument('--reference', help='arm that the others are compared with (default: stock)')
    parser.add_argument('--metric', help='what the verdict is about (default: AP, FID or accuracy)')
    parser.add_argument('--out', type=Path, help='folder (default: work_dirs/ablation/<config>)')
    parser.add_argument('--data', type=Path, help='where the data are, instead of what the config says')
    parser.add_argument(
        '--preserve',
        action=argparse.BooleanOptionalAction,
        help='gates start at one (default: where the config starts from pretrained weights)',
    )
    parser.add_argument('--jobs', type=cli.count, default=1, metavar='N', help='runs side by side (default: 1)')
    parser.add_argument('--threads', type=cli.count, default=1, metavar='N', help='of each run (default: 1)')
    parser.add_argument(
        '--calibrate', type=cli.count, default=64, metavar='N', help='images for gates that depend on it'
    )
    parser.add_argument('--test', default='', metavar='WORDS', help="of the command that evaluates: --test='--fast'")
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='override the config')
    parser.add_argument('--dry-run', action='store_true', help='print the plan of every arm and stop')
    args = parser.parse_args(argv)
    if (args.config is None) == (args.runs is None):
        parser.error('give CONFIG to train, or --runs to compare what was trained')
    if args.dry_run and args.runs is not None:
        parser.error('--runs trains nothing; --dry-run is for CONFIG')

    from asr_downstream.commands.ablation.arms import chosen, preserving
    from asr_downstream.commands.ablation.kinds.base import Plan
    from asr_downstream.commands.ablation.results import result_of, write
    from asr_downstream.commands.ablation.study import Study, open_config, pretrained, read_stored
    from asr_downstream.console.stopping import Stopped

    failed, arms = [], None
    if args.runs is not None:
        out = args.out or Path('work_dirs/ablation/stored')
        kind, records = read_stored(args.runs)
    else:
        path, kind = open_config(args.config)
        arms = chosen(args.arms)
        out = args.out or Path('work_dirs/ablation') / path.stem
        words = tuple(args.cfg_options), tuple(shlex.split(args.test))
        plan = Plan(path, out, args.data, *words, args.calibrate, args.threads)
        base = pretrained(plan, kind)
        if args.preserve or args.preserve is None and base:
            arms = {name: preserving(arm) for name, arm in arms.items()}
        if base and args.preserve is None:
            print(names(f'starts from {base}: {PRESERVED}'), flush=True)
        if base and args.arms == ALL:
            del arms['start']  # would scale what was learnt
        study = Study(plan, kind, arms, args.seeds)
        metric = kind.metric(args.metric)  # refuses now, not after the trainings
        if args.reference is not None and args.reference not in arms:
            raise AsrError(f'--reference: {args.reference!r} is no arm; {did_you_mean(args.reference, arms)}')
        if args.dry_run:
            return study.rehearse(lambda line: print(names(line), flush=True))
        try:
            failed = study.carry_out(args.jobs, lambda line: print(names(line), flush=True))
        except Stopped:
            print(names('stopped; the same command goes on'))
            raise
        records = study.records()
    metric = kind.metric(args.metric)
    key = next(key for key, value in kind.metrics.items() if value == metric)
    if records or not failed:
        result = result_of(kind.name, key, metric, records, args.reference, arms)
        print(result)
        write(result, out, {'command': ['ablate', *(sys.argv[1:] if argv is None else argv)]})
    if failed:
        lines = '; '.join(f'{job.name}: {job.error} ({job.log})' for job in failed)
        raise AsrError(f'{len(failed)} runs failed: {lines}')
