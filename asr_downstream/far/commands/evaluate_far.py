"""Compare a teacher and its FAR family: accuracy, parameters, multiply-adds, latency, token relations.

    asr-downstream evaluate-far work_dirs/far/vit-w64_digits
    asr-downstream evaluate-far OUT --data /data/cifar10-train.zip --rounds 50
    asr-downstream evaluate-far OUT --sweep            # one attention over 64 to 4,096 tokens, batch 1 to 32
    asr-downstream evaluate-far OUT --relations 16     # who looks at whom, on 16 images; writes OUT/relations.png

OUT is the folder that these have written:

    asr-downstream distill-far CONFIG --output-dir OUT
    asr-downstream prune-far CONFIG --output-dir OUT --keep 0.5

Accuracy is that on the images which the config holds out. Latency is paired: every round runs each model once; the
table has ratios with their quartiles. Writes OUT/evaluation.json, with milliseconds. The FAR of a UNet is a run like
any other: asr-downstream evaluate OUT/finetune
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asr_downstream.console import cli
from asr_downstream.errors import AsrError, CheckpointError


def main(argv: Sequence[str] | None = None, names: cli.Names = str) -> None:
    """Parse the command line, measure, print, write JSON."""
    parser = cli.parser(__doc__, 'evaluate-far', names)
    parser.add_argument('folder', type=Path, help='what asr-downstream distill-far wrote')
    parser.add_argument('--data', type=Path, help='image folder or zip, instead of the one in the config')
    parser.add_argument('--rounds', type=cli.count, default=20, help='paired rounds of latency (default: 20)')
    parser.add_argument('--sweep', action='store_true', help='time one attention over numbers of tokens and batches')
    parser.add_argument('--tokens', type=cli.count, nargs='+', help='of --sweep (default: 64 128 ... 4096)')
    parser.add_argument('--batches', type=cli.count, nargs='+', help='of --sweep (default: 1 8 32)')
    parser.add_argument('--device', default='cpu', help='cpu (default), cuda, ...')
    parser.add_argument('--relations', type=cli.count, metavar='N', help='compare token relations on N images')
    args = parser.parse_args(argv)

    from asr_downstream.far.evaluation import evaluate as evaluation
    from asr_downstream.files.atomic import check_writable, write_json
    from asr_downstream.measure.versions import versions

    if not (args.folder / 'shipped').is_dir():
        raise CheckpointError(
            f'{args.folder}: has no shipped models; run tools/distill_far.py first and give its folder'
        )
    check_writable(args.folder)
    if (args.folder / 'evaluation.json').is_dir():
        raise AsrError(f'{args.folder / "evaluation.json"}: cannot be written, it is a folder')
    models = {name: model.to(args.device) for name, model in evaluation.load_family(args.folder).items()}
    task = evaluation.task_of(args.folder, models[evaluation.TEACHER], args.data)
    numbers = evaluation.measure_family(models, task, args.rounds)
    print(evaluation.table(numbers, len(task.held_out)))
    report: dict[str, Any] = {'models': numbers, 'images': len(task.held_out), 'versions': versions()}
    if args.relations:
        picture = args.folder / 'relations.png'
        report['relations'] = evaluation.compare_relations(models, task, args.relations, picture)
        for name, scores in report['relations'].items():
            print(f'{name}: similarity to the attention of the teacher {sum(scores.values()) / len(scores):.3f}')
        print(picture)
    if args.sweep:
        tokens, batches = args.tokens or evaluation.TOKENS, args.batches or evaluation.BATCHES
        report['sweep'] = evaluation.sweep(models, tokens, batches)
        print(evaluation.sweep_table(report['sweep']))
    write_json(args.folder / 'evaluation.json', report)
    evaluation.note_results(args.folder, numbers, task)
