"""Benchmarks, paired in one run: every round times each candidate once; ratios with their quartiles.

    python tools/benchmark.py plug                 # what ASR(SE), SE and DIA cost in training, and folded
    python tools/benchmark.py unet                 # the same on UNets of diffusers
    python tools/benchmark.py det                  # detectors, folded and fused; scoring of 5,000 images
    python tools/benchmark.py det --case Faster    # or RetinaNet, or scoring
    python tools/benchmark.py far --rounds 15      # multi-head LSTMs against attention: bars, ways to run, tokens
    python tools/benchmark.py far --rounds 15 --page docs/benchmarks.md     # and writes the figures into that page
    python tools/benchmark.py launches             # operators dispatched, counted: the same on every machine
    python tools/benchmark.py plug --rounds 100 --out work_dirs/benchmark

Close other programs first; ratios survive a slow machine, but not one that is busy now and then.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asr_downstream.console import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print, write JSON."""
    parser = cli.parser(__doc__)
    parser.add_argument('benchmark', choices=['plug', 'unet', 'det', 'far', 'launches'], help='which one')
    parser.add_argument('--rounds', type=int, default=40, help='paired rounds (default: 40)')
    parser.add_argument('--case', nargs='+', metavar='NAME', help='only the models whose names contain one of these')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmark'), help='folder for the JSON')
    parser.add_argument('--json', type=Path, metavar='FILE', help='file for the JSON (default: OUT/BENCHMARK.json)')
    parser.add_argument('--part', nargs='+', choices=['bars', 'execution', 'tokens'], help='far: only these parts')
    parser.add_argument('--page', type=Path, metavar='FILE', help='far: a page whose figures are written anew')
    args = parser.parse_args(argv)

    from bench import launches, plug

    from asr_downstream.files.atomic import write_json
    from asr_downstream.measure.versions import versions

    file = args.json or args.out / f'{args.benchmark}.json'
    if args.benchmark == 'launches':
        asked = [c for c in launches.CASES if not args.case or any(n.lower() in c.name.lower() for n in args.case)]
        if not asked:
            parser.error(f'--case matches none of: {", ".join(c.name for c in launches.CASES)}')
        counted = [launches.measure(c) for c in asked if not c.missing]
        if counted:
            print(launches.table(counted))
        for left_out in (c for c in asked if c.missing):
            print(f'{left_out.name} is left out: {left_out.needs} is not installed')
        write_json(file, {'cases': counted, 'versions': versions()})
        return
    if args.benchmark == 'far':
        from bench import far_report

        known_sizes = far_report.CASES
        sizes = [
            case for case in known_sizes if not args.case or any(n.lower() in case.name.lower() for n in args.case)
        ]
        if not sizes:
            parser.error(f'--case matches none of: {", ".join(case.name for case in known_sizes)}')
        measured, texts = far_report.measure(sizes, args.rounds, args.part or far_report.PARTS)
        if args.page:
            far_report.write(args.page, texts)
        write_json(file, {**measured, 'versions': versions()})
        return
    if args.benchmark == 'det':
        from bench import coco, det

        detectors = []
        for case in det.CASES:
            if not args.case or any(name.lower() in case.name.lower() for name in args.case):
                detectors.append(det.measure_detector(case, args.rounds))
                print(det.table(detectors[-1]), flush=True)
        scoring = None
        if not args.case or 'scoring' in args.case:
            faster, scoring = coco.measure_scoring(min(args.rounds, 3))
            print(
                f'scoring {scoring["detections"]:,} detections: faster-coco-eval is {faster} x as fast as pycocotools'
            )
        if not detectors and scoring is None:
            parser.error(f'--case matches none of: {", ".join(case.name for case in det.CASES)}, scoring')
        write_json(file, {'detectors': detectors, 'scoring': scoring, 'versions': versions()})
        return
    known: Any = plug.CASES
    if args.benchmark == 'unet':
        from bench.unet import CASES as known
    cases = [c for c in known if not args.case or any(n.lower() in c.name.lower() for n in args.case)]
    if not cases:
        parser.error(f'--case matches none of: {", ".join(c.name for c in known)}')
    results = [plug.measure(case, args.rounds) for case in cases]
    print(plug.table(results))
    for result in results:
        print(f'{result["case"]}: the two forms of each agree to {max(result["agreement"].values()):.1e}')
        for arm, counts in result['launches'].items():
            if counts['training']['extra']:
                print(f'{result["case"]}, {launches.extra_line(arm, counts)}')
    report: dict[str, Any] = {'cases': results, 'versions': versions()}
    if args.benchmark == 'plug' and not args.case:
        report['fold_faster_rcnn_r50_seconds'] = plug.fold_seconds()
        text, report['parameters'] = plug.depth_table()
        print(text)
        print(f'folding Faster R-CNN R50: {report["fold_faster_rcnn_r50_seconds"]:.2f} s')
    write_json(file, report)


if __name__ == '__main__':
    cli.run(main)
