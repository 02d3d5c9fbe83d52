"""Benchmarks, paired in one run: every round times each candidate once; ratios with their quartiles.

    python tools/benchmark.py plug                 # what ASR(SE), SE and DIA cost in training, and folded
    python tools/benchmark.py unet                 # the same on UNets of diffusers
    python tools/benchmark.py det                  # detectors, folded and fused; scoring of 5,000 images
    python tools/benchmark.py det --case Faster    # or RetinaNet, or scoring
    python tools/benchmark.py learns               # a detector of which only gates, norms or the head learn
    python tools/benchmark.py far --rounds 15      # multi-head LSTMs against attention: bars, ways to run, tokens
    python tools/benchmark.py far --rounds 15 --page docs/benchmarks.md     # and writes the figures into that page
    python tools/benchmark.py launches             # operators dispatched, counted: the same on every machine
    python tools/benchmark.py plug --plug ASR --rounds 60 --threads 1 2     # one plug, on one thread and on two
    python tools/benchmark.py plug unet launches --device cuda     # on a GPU: milliseconds, memory, many ways to run
    python tools/benchmark.py plug --device cuda --case 56 --variant training eager --minutes 10

Close other programs first; ratios survive a slow machine, but not one that is busy now and then.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from asr_downstream.console import cli

Save = Callable[[dict[str, Any]], None]
ON_DEVICE = ('plug', 'unet', 'launches')


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print, write JSON."""
    parser = cli.parser(__doc__)
    parser.add_argument('benchmark', nargs='+', choices=list(BENCHMARKS), help='which ones')
    parser.add_argument('--rounds', type=int, default=40, help='paired rounds (default: 40)')
    parser.add_argument(
        '--threads', type=int, nargs='+', default=[1], metavar='N', help='plug, unet: threads of PyTorch (default: 1)'
    )
    parser.add_argument('--case', nargs='+', metavar='NAME', help='only the models whose names contain one of these')
    parser.add_argument('--plug', nargs='+', metavar='NAME', help='plug, unet: only plugs whose names contain one')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmark'), help='folder for the JSON')
    parser.add_argument(
        '--json', type=Path, metavar='FILE', help='file for the JSON, of all benchmarks (default: OUT/BENCHMARK.json)'
    )
    parser.add_argument(
        '--device', choices=['cpu', 'cuda'], default='cpu', help=f'cuda: {", ".join(ON_DEVICE)}, on a CUDA device'
    )
    parser.add_argument(
        '--variant', nargs='+', metavar='TEXT', help='cuda: only the ways to run that contain all these'
    )
    parser.add_argument('--minutes', type=cli.finite, help='cuda: start no way to run after so many, each benchmark')
    parser.add_argument('--part', nargs='+', choices=['bars', 'execution', 'tokens'], help='far: only these parts')
    parser.add_argument('--page', type=Path, metavar='FILE', help='far: a page whose figures are written anew')
    args = parser.parse_args(argv)
    if args.device == 'cuda':
        import torch

        if elsewhere := [name for name in args.benchmark if name not in ON_DEVICE]:
            parser.error(f'--device cuda: {", ".join(ON_DEVICE)}, not {", ".join(elsewhere)}')
        if not torch.cuda.is_available():
            parser.exit(
                2,
                f'error: --device cuda: PyTorch {torch.__version__} sees no CUDA device; run the same command where '
                f"python -c 'import torch; print(torch.cuda.is_available())' says True, or leave --device out\n",
            )

    from asr_downstream.files.atomic import write_json

    names = list(dict.fromkeys(args.benchmark))
    reports: dict[str, Any] = {}
    for name in names:

        def save(report: dict[str, Any], name: str = name) -> None:
            reports[name] = report
            together = args.json is not None and len(names) > 1
            write_json(args.json or args.out / f'{name}.json', reports if together else report)

        BENCHMARKS[name](args, parser, save)


def chosen(args: Namespace, parser: cli.Parser, cases: Sequence[Any], others: Sequence[str] = ()) -> list[Any]:
    """The cases that ``--case`` names and whose libraries are installed; of the others a line is printed.

    With several benchmarks, a name may be that of a case of another one.
    """
    asked = [c for c in cases if not args.case or any(name.lower() in c.name.lower() for name in args.case)]
    if not asked and not set(others) & set(args.case):
        names = ', '.join([*(c.name for c in cases), *others])
        if len(args.benchmark) == 1:
            parser.error(f'--case matches none of: {names}')
        print(f'--case matches none of: {names}')
    missing = [c for c in asked if getattr(c, 'missing', False)]
    for case in missing:
        print(f'{case.name} is left out: {case.needs} is not installed')
    return [c for c in asked if c not in missing]


def launches(args: Namespace, parser: cli.Parser, save: Save) -> None:
    """Count operators."""
    import torch
    from bench import launches

    from asr_downstream.measure.device import card
    from asr_downstream.measure.versions import versions

    counted = [launches.measure(case) for case in chosen(args, parser, launches.CASES)]
    if counted:
        print(launches.table(counted))
    save({'cases': counted, 'versions': versions(), 'device': card(torch.device(args.device))})


def far(args: Namespace, parser: cli.Parser, save: Save) -> None:
    """Measure multi-head LSTMs."""
    from bench import far_report

    from asr_downstream.measure.versions import versions

    sizes = chosen(args, parser, far_report.CASES)
    measured, texts = far_report.measure(sizes, args.rounds, args.part or far_report.PARTS)
    if args.page:
        far_report.write(args.page, texts)
    save({**measured, 'versions': versions()})


def det(args: Namespace, parser: cli.Parser, save: Save) -> None:
    """Measure detectors and scoring."""
    from bench import coco, det

    from asr_downstream.measure.versions import versions

    detectors = []
    for case in chosen(args, parser, det.CASES, ('scoring',)):
        detectors.append(det.measure_detector(case, args.rounds))
        print(det.table(detectors[-1]), flush=True)
    scoring = None
    if not args.case or 'scoring' in args.case:
        faster, scoring = coco.measure_scoring(min(args.rounds, 3))
        print(f'scoring {scoring["detections"]:,} detections: faster-coco-eval is {faster} x as fast as pycocotools')
    save({'detectors': detectors, 'scoring': scoring, 'versions': versions()})


def learns(args: Namespace, parser: cli.Parser, save: Save) -> None:
    """Measure a detector of which a part learns."""
    from bench import learns

    from asr_downstream.measure.versions import versions

    measured = learns.measure(args.rounds)
    print(learns.table(measured))
    save({**measured, 'versions': versions()})


def plug(args: Namespace, parser: cli.Parser, save: Save) -> None:
    """Measure plugs on ResNets."""
    from bench import plug

    plugs(args, parser, save, plug.CASES, depths=not args.case)


def unet(args: Namespace, parser: cli.Parser, save: Save) -> None:
    """Measure plugs on UNets."""
    from bench.unet import CASES

    plugs(args, parser, save, CASES)


def plugs(args: Namespace, parser: cli.Parser, save: Save, known: Sequence[Any], depths: bool = False) -> None:
    """Measure plugs on models, on the CPU or a device; ``depths``: the tables of depths and folding too."""
    from bench import launches, plug

    from asr_downstream.measure.versions import versions

    cases = chosen(args, parser, known)
    if args.device == 'cuda':
        on_device(args, parser, save, cases)
        return
    names = sorted({plug.SCALED, *(name for case in cases for name in case.dynamic)})
    if args.plug and not any(text.lower() in name.lower() for text in args.plug for name in names):
        parser.error(f'--plug matches none of: {", ".join(names)}')
    results = [
        plug.measure(case, args.rounds, threads=threads, plugs=args.plug) for case in cases for threads in args.threads
    ]
    if results:
        print(plug.table(results))
    for result in results:
        print(f'{result["case"]}: the two forms of each agree to {max(result["agreement"].values()):.1e}')
        for arm, counts in result['launches'].items():
            if counts['training']['extra']:
                print(f'{result["case"]}, {launches.extra_line(arm, counts)}')
    report: dict[str, Any] = {'cases': results, 'versions': versions()}
    if depths and len(cases) == len(known):
        report['fold_faster_rcnn_r50_seconds'] = plug.fold_seconds()
        text, report['parameters'] = plug.depth_table()
        print(text)
        print(f'folding Faster R-CNN R50: {report["fold_faster_rcnn_r50_seconds"]:.2f} s')
    save(report)


def on_device(args: Namespace, parser: cli.Parser, save: Save, cases: Sequence[Any]) -> None:
    """Measure plugs on a device, in all ways to run."""
    import torch
    from bench import device

    variants = [v for v in device.VARIANTS if all(text.lower() in v.name.lower() for text in args.variant or ())]
    if not variants:
        parser.error(
            f'--variant {" ".join(args.variant)}: no way to run has all of these; one is {device.VARIANTS[0].name!r}'
        )
    print(device.table(device.measure(cases, torch.device(args.device), args.rounds, variants, args.minutes, save)))


BENCHMARKS: dict[str, Callable[[Namespace, cli.Parser, Save], None]] = {
    'plug': plug,
    'unet': unet,
    'det': det,
    'learns': learns,
    'far': far,
    'launches': launches,
}


if __name__ == '__main__':
    cli.run(main)
