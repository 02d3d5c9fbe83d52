"""Gather trained and tested detectors in one table: mean and spread over the seeds.

    for s in 0 1 2; do
      asr-downstream train-det CONFIG --work-dir runs/NAME-s$s --seed $s
      asr-downstream test-det CONFIG runs/NAME-s$s/epoch_12.pth --fold --work-dir runs/NAME-s$s
    done
    asr-downstream results-det runs/* --out results.jsonl

Numbers are those of the last epoch. A run that is not complete, or was tested at another epoch, is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from asr_downstream.console import cli
from asr_downstream.errors import DataError


def main(argv: Sequence[str] | None = None, names: cli.Names = str) -> None:
    """Parse the command line, read the runs, print the table, write the records."""
    parser = cli.parser(__doc__, 'results-det', names)
    parser.add_argument('runs', type=Path, nargs='+', help='work dirs of asr-downstream train-det')
    parser.add_argument('--out', type=Path, help='JSON lines to write, one a run')
    args = parser.parse_args(argv)

    from asr_downstream.detection.evaluation.results import markdown, read_run, write_jsonl
    from asr_downstream.files.atomic import check_could_write

    if args.out:
        check_could_write(args.out.parent)
    records, left_out = [], []
    for run in args.runs:
        try:
            records.append(read_run(run))
        except DataError as error:
            left_out.append(str(error))
    if records:
        print(markdown(records))
        if args.out:
            write_jsonl(args.out, records)
    if len(left_out) == 1:
        raise DataError(left_out[0])
    if left_out:
        print(*(names(f'left out: {line}') for line in left_out), sep='\n', file=sys.stderr)
        raise DataError(f'{len(left_out)} of {len(args.runs)} runs are left out, see above')
