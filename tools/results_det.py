"""Gather trained and tested detectors: one record a run, and a table with mean and spread over seeds.

    for s in 0 1 2; do
      python tools/train_det.py CONFIG --work-dir runs/NAME-s$s --seed $s
      python tools/test_det.py CONFIG runs/NAME-s$s/epoch_12.pth --fold --work-dir runs/NAME-s$s
    done
    python tools/results_det.py runs/* --out results.jsonl

Always the last epoch. Runs that are incomplete, or were tested at another epoch, are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asr_downstream.console import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, read the runs, print the table, write the records."""
    parser = cli.parser(__doc__)
    parser.add_argument('runs', type=Path, nargs='+', help='work dirs of tools/train_det.py')
    parser.add_argument('--out', type=Path, help='JSON lines to write, one a run')
    args = parser.parse_args(argv)

    from asr_downstream.detection.evaluation.results import markdown, read_run, write_jsonl
    from asr_downstream.files.atomic import check_could_write

    if args.out:
        check_could_write(args.out.parent)
    records = [read_run(run) for run in args.runs]
    print(markdown(records))
    if args.out:
        write_jsonl(args.out, records)


if __name__ == '__main__':
    cli.run(main)
