"""Train an image classifier, stock or plugged; fold it, measure both on images held out, ship the stock one.

    asr-downstream train-cls resnet20_cifar10-10k --data /data/cifar10-train.zip     # a ready config, by name or path
    asr-downstream train-cls CONFIG --plug asr-se --seed 1   # or se, dia, asr-dia, start, layerscale, stock, ...
    asr-downstream train-cls CONFIG --plug start --cfg-options plug.value=0.25
    asr-downstream train-cls CONFIG --plug se --calibrate 512    # gates that depend on the input: their mean ships
    asr-downstream train-cls CONFIG --resume                 # go on; a run that is complete is measured again
    asr-downstream train-cls CONFIG --dry-run                # sites, cost and steps; trains nothing
    accelerate launch --multi_gpu --num_processes 8 -m asr_downstream train-cls CONFIG

Writes log and checkpoints to OUT, then OUT/evaluation.json, accuracy of the last weights, plugged and folded, and
OUT/shipped, the stock model. A tenth of the images, always the same, is held out.

Keys of a config and their defaults: asr_downstream/classification/defaults.py and asr_downstream/engine/defaults.py.
Names of --plug: asr_downstream/classification/plugs.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from asr_downstream.classification.plugs import PLUGS
from asr_downstream.console import cli
from asr_downstream.files.ready import find_config


def main(argv: Sequence[str] | None = None, names: cli.Names = str) -> None:
    """Parse the command line, train, evaluate, ship."""
    parser = cli.parser(__doc__, 'train-cls', names)
    parser.add_argument('config', type=Path, help='a file, or the name of a ready config')
    parser.add_argument('--data', type=Path, help='image folder or zip, instead of the one in the config')
    parser.add_argument('--plug', metavar='NAME', help=f"instead of the config's: {', '.join(PLUGS)}")
    parser.add_argument('--output-dir', type=Path, help='default: work_dirs/cls/<config>_<plug>_seed<seed>')
    parser.add_argument('--resume', action='store_true', help='continue the run from its newest complete checkpoint')
    parser.add_argument('--seed', type=int, help='random seed, instead of the one in the config')
    parser.add_argument('--calibrate', type=cli.count, metavar='N', help='see above')
    parser.add_argument('--dry-run', action='store_true', help='print the plan and stop')
    cli.add_options(parser)
    args = parser.parse_args(argv)

    from asr_downstream.classification.config import load_config

    options = dict(args.cfg_options or {}) | ({} if args.seed is None else {'seed': args.seed})
    config = load_config(find_config(args.config, 'tools/cls_configs'), options, args.data, args.plug)
    if args.output_dir is not None:
        config.output_dir = str(args.output_dir)
    elif config.output_dir is None:
        name = '_'.join([Path(config.filename).stem, *filter(None, [args.plug]), f'seed{config.seed}'])
        config.output_dir = str(Path('work_dirs', 'cls', name))
    if args.dry_run:
        from asr_downstream.classification.train import plan

        print(plan(config))
        return
    from asr_downstream.classification.evaluate import evaluate_run, verdict
    from asr_downstream.classification.train import train
    from asr_downstream.engine.launch import end_processes

    task, checkpoint = train(config, 'latest' if args.resume else None)
    end_processes()
    if not int(os.environ.get('RANK', '0')):
        print(verdict(evaluate_run(task, checkpoint, args.calibrate), checkpoint.parent))
