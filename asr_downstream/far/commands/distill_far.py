"""Replace the self-attention of a model by multi-head LSTMs and distil them (FAR, arXiv 2505.21535).

    asr-downstream distill-far vit-w64_digits             # teacher, distillation, fine-tuning; a ready config by name
    asr-downstream distill-far CONFIG --data /data/images --output-dir runs/far
    asr-downstream distill-far CONFIG --cfg-options train_batch_size=32 stages.1.epochs=5
    asr-downstream distill-far CONFIG --cfg-options replace.mixer=linear   # linear attention instead, as a control
    asr-downstream distill-far CONFIG --resume            # passes over finished stages
    asr-downstream distill-far CONFIG --dry-run           # what would be replaced and trained
    accelerate launch --multi_gpu --num_processes 8 -m asr_downstream distill-far CONFIG

Each stage is a run of its own, OUT/<stage>, with log, checkpoints and resolved config. OUT/shipped holds the teacher
and FAR-100, the student before pruning. What comes next:

    asr-downstream evaluate-far OUT
    asr-downstream prune-far CONFIG --keep 0.5

Keys of a config and their defaults: asr_downstream/far/defaults.py and asr_downstream/engine/defaults.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asr_downstream.console import cli
from asr_downstream.files.ready import find_config


def main(argv: Sequence[str] | None = None, names: cli.Names = str) -> None:
    """Parse the command line and train."""
    parser = cli.parser(__doc__, 'distill-far', names)
    parser.add_argument('config', type=Path, help='a file, or the name of a ready config')
    parser.add_argument('--data', type=Path, help='image folder or zip, instead of the one in the config')
    parser.add_argument('--output-dir', type=Path, help='folder of the stages (default: work_dirs/far/<config>)')
    parser.add_argument('--resume', action='store_true', help='continue: finished stages stay')
    parser.add_argument('--seed', type=int, help='random seed, instead of the one in the config')
    parser.add_argument('--dry-run', action='store_true', help='print the plan and stop')
    cli.add_options(parser)
    args = parser.parse_args(argv)

    from asr_downstream.engine.launch import end_processes
    from asr_downstream.far.config import load_config
    from asr_downstream.far.distil.stages import plan, run_stages
    from asr_downstream.far.family import ship_trained
    from asr_downstream.files.configs import work_dir_of

    options = dict(args.cfg_options or {}) | ({} if args.seed is None else {'seed': args.seed})
    config = load_config(find_config(args.config, 'tools/far_configs'), options, args.data)
    out = args.output_dir or work_dir_of(config, 'far')
    if args.dry_run:
        print(plan(config))
        return
    run_stages(config, out, args.resume)
    ship_trained(config, out)
    end_processes()
